"""The connection to an object store: its client, what it retries, what its errors mean.

Configured by the standard AWS variables (AWS_ENDPOINT_URL or AWS_ENDPOINT_URL_S3, AWS_REGION,
AWS_ACCESS_KEY_ID, AWS_PROFILE, ...). Without any credentials, or with AWS_NO_SIGN_REQUEST=true,
requests go unsigned, as public buckets want them; with AWS_REQUEST_PAYER=requester they say that
the reader pays, as some buckets want it; with AWS_VIRTUAL_HOSTING=true the bucket's name goes into
the host's, as some stores want it. Only this module imports boto3.
"""

import functools
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from carn.errors import AccessDeniedError, MissingObjectError, StorageError

logger = logging.getLogger(__name__)

# Requests of one process under way at once. S3 serves single ranges at 50-100 MB/s, so a few
# parallel ones fill a node's network.
MAX_CONCURRENT_REQUESTS = 16
# Times a request is sent while the store is busy, restarts or drops the connection. With the
# waits between them they span 8-16 s: a gateway that restarts is outlived.
REQUEST_ATTEMPTS = 7
# Codes of a status 400 that is about credentials.
# Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
EXPIRED = ("ExpiredToken", "TokenRefreshRequired", "RequestExpired")
FIRST_WAIT_S = 0.25
LONGEST_WAIT_S = 10.0
# Times a GET is sent when its connection breaks under the body.
GET_ATTEMPTS = 4

# What says "later", not "no".
# Source: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_BUSY_STATUS = (429, 500, 502, 503, 504)
_BUSY_CODES = ("RequestTimeout", "SlowDown", "Throttling")

# A change of these (tests, notebooks) takes effect with the next request.
_AWS_SETTINGS = (
    *("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_NO_SIGN_REQUEST"),
    *("AWS_REQUEST_PAYER", "AWS_VIRTUAL_HOSTING"),
)
# The names that GDAL has for them.
REQUEST_PAYER = "AWS_REQUEST_PAYER"
VIRTUAL_HOSTING = "AWS_VIRTUAL_HOSTING"
# What stores say that want the bucket in the host's name: Alibaba's OSS, Huawei's OBS, Tencent's
# COS, Volcengine's TOS, as their users report.
_WANT_VIRTUAL_HOSTS = (
    *("SecondLevelDomainForbidden", "VirtualHostDomainRequired", "PathStyleDomainForbidden"),
    "InvalidPathAccess",
)


def split_s3(uri: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; either may be empty."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def split_object(uri: str) -> tuple[str, str]:
    """Bucket and key of an object.

    Raises:
        MissingObjectError: the name is of a bucket.
    """
    bucket, key = split_s3(uri)
    if not key:
        raise MissingObjectError(uri, "names a bucket, not an object in it")
    return bucket, key


def s3_client() -> Any:
    """This process's boto3 client for the store that the environment names; for any thread."""
    settings = tuple(os.environ.get(name) for name in _AWS_SETTINGS)
    return _s3_client_for(os.getpid(), settings)


def get_body(**request: str) -> bytes:
    """The content that a GetObject request answers, asked for again when it breaks off."""
    # botocore retries until the headers are in; a connection that breaks under the body is ours.
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    for attempt in range(1, GET_ATTEMPTS + 1):
        try:
            return cast(bytes, s3_client().get_object(**request)["Body"].read())
        except (HTTPClientError, IncompleteReadError):
            if attempt == GET_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


@functools.lru_cache(maxsize=4)
def _s3_client_for(_process: int, _settings: tuple[str | None, ...]) -> Any:
    # One client per process and setting: clients are thread-safe, but do not survive a fork.
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    session = boto3.session.Session(
        region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    )
    options: dict[str, Any] = {
        # Retries are ours, below. botocore's (1.44) share a budget between all requests of a
        # client: a second of outage under 16 threads spends it, and from then on the first
        # dropped connection is an error. And they give up on a refused connection after 1.5 s.
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "max_pool_connections": MAX_CONCURRENT_REQUESTS + 4,
        "connect_timeout": 10,
        "read_timeout": 60,
        # Checksums that some S3-compatible servers (older Ceph) refuse are sent only where
        # the operation demands one.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    if _is_true("AWS_NO_SIGN_REQUEST") or session.get_credentials() is None:
        options["signature_version"] = UNSIGNED
    if _is_true(VIRTUAL_HOSTING):  # with an endpoint of one's own, botocore puts it into the path
        options["s3"] = {"addressing_style": "virtual"}
    client = session.client("s3", config=Config(**options))
    client.meta.events.register("needs-retry.s3", _wait_before_retry)
    if os.environ.get(REQUEST_PAYER):
        client.meta.events.register("provide-client-params.s3", _with_payer)
    return client


def _is_true(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")


def _with_payer(*, params: dict[str, Any], model: Any, **_: Any) -> dict[str, Any]:
    """The parameters of a request that says who pays, where its operation can say it."""
    if "RequestPayer" not in model.input_shape.members:
        return params
    return {"RequestPayer": os.environ.get(REQUEST_PAYER, "requester")} | params


def _wait_before_retry(
    *,
    response: tuple[Any, dict[str, Any]] | None,
    caught_exception: Exception | None,
    attempts: int,
    operation: Any,
    **_: Any,
) -> float | None:
    """Seconds until a request is sent again; None where its answer or error stands."""
    from botocore.exceptions import ConnectionError, HTTPClientError

    if response is None:
        is_busy = isinstance(caught_exception, ConnectionError | HTTPClientError)
        reason = str(caught_exception)
    else:
        # An error in the body of a 200 answer (a completion does that) has been made a 500.
        reason = str(response[1].get("Error", {}).get("Code", ""))
        is_busy = response[0].status_code in _BUSY_STATUS or reason in _BUSY_CODES
    if not is_busy or attempts >= REQUEST_ATTEMPTS:
        return None
    longest_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempts - 1))
    wait_s = random.uniform(longest_s / 2, longest_s)  # apart, where many were refused together
    logger.debug("%s again in %.1f s: %s", operation.name, wait_s, reason)
    return wait_s


def error_code(error: StorageError) -> str:
    """The object store's own word for what went wrong (`NoSuchUpload`); "" where it had none."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Turn what boto3 raises into errors that name the object and the way out.

    Raises:
        MissingObjectError, AccessDeniedError, StorageError: instead of boto3's.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        HTTPClientError,
        ProfileNotFound,
    )

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code", ""))
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if code == "NoSuchBucket":
            raise MissingObjectError(uri, "no such bucket") from error
        if code in ("NoSuchKey", "404", "NotFound") or status == 404:
            raise MissingObjectError(uri, "no such object") from error
        if code in _WANT_VIRTUAL_HOSTS:
            raise StorageError(
                uri,
                f"the store wants the bucket in its host's name ({code}): set "
                f"{VIRTUAL_HOSTING}=true",
            ) from error
        if status in (401, 403):
            raise AccessDeniedError(
                uri,
                f"access denied ({code}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or "
                "AWS_PROFILE; for a public bucket set AWS_NO_SIGN_REQUEST=true, for one whose "
                f"readers pay {REQUEST_PAYER}=requester (--request-payer), for a store that wants "
                f"the bucket in its host's name {VIRTUAL_HOSTING}=true",
            ) from error
        if code in EXPIRED:
            raise AccessDeniedError(
                uri,
                f"the credentials have expired ({code}): renew them, AWS_SESSION_TOKEN with the "
                "others, or use a profile or role that renews itself",
            ) from error
        if code == "400":  # HEAD: the answer has no body to say why
            raise StorageError(
                uri, "the object store answered 400; expired credentials are a likely cause"
            ) from error
        if status == 412:
            raise StorageError(uri, "was replaced while it was read; open it again") from error
        raise StorageError(uri, f"the object store answered {code}: {error}") from error
    except ProfileNotFound as error:
        raise StorageError(uri, f"no credentials: {error}; check AWS_PROFILE") from error
    except (Boto3Error, BotoCoreError, HTTPClientError) as error:
        raise StorageError(
            uri, f"the object store cannot be reached ({error}); check AWS_ENDPOINT_URL"
        ) from error
    except ValueError as error:
        # What botocore raises over an endpoint that is no URL.
        if "endpoint" not in str(error).lower():
            raise
        raise StorageError(uri, f"{error}; check AWS_ENDPOINT_URL") from error
