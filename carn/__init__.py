"""Super-resolution of whole-slide pathology images with channel attention retention (CARN).

The functional core: plain Python and torch, without Ray. The jobs that run it on a cluster are in
`jobs/`.
"""

__version__ = "0.1.0"
