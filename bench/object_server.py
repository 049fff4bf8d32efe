"""Files of this machine as objects of a bucket, as fast as loopback allows: what a benchmark reads, nothing else.

moto's server, which the tests use, copies the whole object for every range of it, so with gigabytes it would be
measured and not its client. This one sends ranges out of the page cache (`sendfile`) and knows GET, HEAD and a list.
Signatures are not looked at.

    python bench/object_server.py PORT NAME=FOLDER…    objects are s3://bucket/NAME/PATH
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

LIST = "<Name>bucket</Name><IsTruncated>false</IsTruncated>"


def application(folders: dict[str, Path]) -> web.Application:
    """Return the server's routes; the first part of a key names one of `folders`."""

    async def read(request: web.Request) -> web.StreamResponse:
        name, _, rest = request.match_info["key"].partition("/")
        path = folders.get(name, Path("/nowhere")) / rest
        if not path.is_file():
            return web.Response(status=404, text="<Error><Code>NoSuchKey</Code></Error>", content_type="text/xml")
        return web.FileResponse(path)

    async def listing(request: web.Request) -> web.Response:
        prefix = request.query.get("prefix", "")
        keys = [
            (f"{name}/{path.relative_to(folder).as_posix()}", path.stat().st_size)
            for name, folder in folders.items()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        body = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size></Contents>"
            for key, size in keys
            if key.startswith(prefix)
        )
        return web.Response(text=f"<ListBucketResult>{LIST}{body}</ListBucketResult>", content_type="application/xml")

    app = web.Application()
    app.add_routes([web.get("/bucket/{key:.+}", read), web.get("/bucket", listing), web.get("/bucket/", listing)])
    return app


if __name__ == "__main__":
    places = (place.partition("=") for place in sys.argv[2:])
    served = {name: Path(folder) for name, _, folder in places}
    web.run_app(application(served), host="127.0.0.1", port=int(sys.argv[1]), print=None)
