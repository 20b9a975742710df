"""What S3 can do beyond fsspec: send a part again, replace an object only if it is the expected one, list uploads.

Keys, endpoint and region are what botocore finds (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL,
AWS_REGION, a profile, a role); whatever else s3fs takes can stand in fsspec's configuration (FSSPEC_S3_...).
"""

from __future__ import annotations

import errno
from typing import Any

import attrs
from fsspec.asyn import sync
from fsspec.config import conf

from drivetrain_plugins.checkpoint._bucket import PART, SMALL, Bucket, Stat, stat_of
from drivetrain_plugins.checkpoint._retry import service_code

MOST_PARTS = 10_000


@attrs.frozen
class Upload:
    """An object that is sent in parts."""

    path: str
    key: dict[str, str]  # as S3 calls it


class S3Bucket(Bucket):
    """A place in S3, or in what speaks its protocol."""

    resumes = True

    def options(self) -> dict[str, Any]:
        """Leave trying again to the caller, who knows how much time there is."""
        given = conf.get("s3", {}).get("config_kwargs", {})
        retries = {"total_max_attempts": 1, "mode": "standard"}
        return {"config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": retries, **given}}

    def _connect(self) -> None:
        super()._connect()
        self._fs.retries = 1

    def _call(self, method: str, limit_s: float, **arguments: Any) -> Any:
        return self.fs.call_s3(method, timeout=limit_s, **arguments)

    def _key(self, path: str) -> dict[str, str]:
        bucket, key, _ = self.fs.split_path(path)
        return {"Bucket": bucket, "Key": key}

    def create(self, path: str, data: bytes, limit_s: float) -> None:
        """Write an object if there is none (If-None-Match)."""
        _conditional(lambda: self._call("put_object", limit_s, Body=data, IfNoneMatch="*", **self._key(path)))

    def replace(self, path: str, data: bytes, tag: Any, limit_s: float) -> None:
        """Write an object in place of the one with this tag (If-Match)."""
        _conditional(lambda: self._call("put_object", limit_s, Body=data, IfMatch=tag, **self._key(path)))

    def look(self, path: str, limit_s: float) -> tuple[bytes, Any]:
        """Return an object's bytes and its tag, which belong to each other, with one request."""

        async def get() -> tuple[bytes, str]:
            found = await self.fs._call_s3("get_object", **self._key(path))  # noqa: SLF001 - fsspec's name of what can be awaited
            try:
                if found["ContentLength"] > SMALL:
                    raise OSError(errno.EFBIG, f"expected at most {SMALL} bytes, found {found['ContentLength']}")
                return await found["Body"].read(), found["ETag"]
            finally:
                found["Body"].close()

        result: tuple[bytes, Any] = sync(self.fs.loop, get, timeout=limit_s)
        return result

    def find(self, path: str, limit_s: float) -> dict[str, Stat]:
        """Return the objects below a path, page by page, as they are at this moment."""
        place = self._key(f"{path}/")
        found: dict[str, Stat] = {}
        mark: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", limit_s, Bucket=place["Bucket"], Prefix=place["Key"], **mark)
            for about in page.get("Contents", []):
                found[about["Key"].removeprefix(place["Key"])] = stat_of({**about, "size": about["Size"]})
            if not page.get("IsTruncated"):
                return {name: about for name, about in found.items() if name}  # less the "folder" that a console makes
            mark = {"ContinuationToken": page["NextContinuationToken"]}

    def start(self, path: str, limit_s: float) -> Upload:
        """Create a multipart upload."""
        key = self._key(path)
        made = self._call("create_multipart_upload", limit_s, **key)
        return Upload(path, {**key, "UploadId": made["UploadId"]})

    def send(self, upload: Upload, number: int, part: bytes, limit_s: float) -> str:
        """Send a part, again if need be: of two with a number the later counts."""
        if number > MOST_PARTS:
            raise OSError(
                errno.EFBIG, f"a file is larger than {MOST_PARTS * PART} bytes; save it in parts (form = sharded)"
            )
        tag: str = self._call("upload_part", limit_s, PartNumber=number, Body=part, **upload.key)["ETag"]
        return tag

    def finish(self, upload: Upload, tags: list[Any], size: int, limit_s: float) -> None:
        """Complete the upload; where it is gone but the object is there, a try whose answer was lost has done it."""
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        try:
            self._call("complete_multipart_upload", limit_s, MultipartUpload={"Parts": parts}, **upload.key)
        except FileNotFoundError:
            if self.stat(upload.path, limit_s).size != size:
                raise

    def abort(self, upload: Upload, limit_s: float) -> None:
        """Abort the upload."""
        self._call("abort_multipart_upload", limit_s, **upload.key)

    def abort_uploads(self, path: str, before: float, limit_s: float) -> None:
        """Abort what was begun below a path before a time, page by page."""
        place = self._key(f"{path}/")
        marks: dict[str, str] = {}
        while True:
            page = self._call("list_multipart_uploads", limit_s, Bucket=place["Bucket"], Prefix=place["Key"], **marks)
            for found in page.get("Uploads", []):
                if found["Key"].startswith(place["Key"]) and found["Initiated"].timestamp() < before:
                    upload = Upload(
                        path, {"Bucket": place["Bucket"], "Key": found["Key"], "UploadId": found["UploadId"]}
                    )
                    self.abort(upload, limit_s)
            if not page.get("IsTruncated"):
                return
            marks = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def _conditional(call: Any) -> None:
    """Put, where a condition that does not hold is a FileExistsError."""
    try:
        call()
    except FileExistsError:
        raise
    except OSError as error:
        if service_code(error) in {"PreconditionFailed", "412"}:
            raise FileExistsError(errno.EEXIST, "another object is there") from error
        if error.errno == errno.ENOSYS:
            raise NotImplementedError(str(error)) from error
        raise
