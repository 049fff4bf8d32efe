"""handler.py, restored from a process image: `HANDLER=tests/engine/restored.py pytest tests/engine`, `make test-image`.

The image is made by the first of these workers, in its environment; where it does not fit another's, a boot is plain.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ROOT / "build" / "image"
IMAGE = PROGRAMS / "tests.image"

if __name__ == "__main__":
    made_for = PROGRAMS / "tests.home"
    home = os.environ.get("HOME", "")
    if not made_for.exists() or made_for.read_text() != home:
        program = (
            "import sys; sys.path.insert(0, sys.argv[1]); from coldsnap import make_image;"
            "sys.exit(make_image.command(sys.argv[2:]))"
        )
        environ = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        command = [sys.executable, "-P", "-c", program, str(ROOT / "src"), str(IMAGE)]
        if subprocess.run(command, env=environ, check=False).returncode == 0:
            made_for.write_text(home)
    handler = str(ROOT / "handler.py")
    os.execv(PROGRAMS / "restore", ["restore", "auto", str(IMAGE), sys.executable, handler, *sys.argv[1:]])
