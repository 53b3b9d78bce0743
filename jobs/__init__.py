"""The Ray shell: one page per job."""
