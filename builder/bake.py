"""Turn a model into a snapshot: resolve -> download -> quantise -> check -> manifest.

A stage that an earlier bake has done, before it was killed, is not done again. Until the last rename there is
nothing under the snapshot's name.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ |= {"LLM_COMPRESSOR_LOG_DISABLED": "true", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two threads that spin at barriers stop a busy machine
sys.path[0:1] = [str(ROOT), str(ROOT / "src")]  # not builder/ itself: its modules belong to the package

from blake3 import blake3  # noqa: E402 (the path is set above)

from builder import schemes  # noqa: E402
from builder.checkpoint import Checkpoint  # noqa: E402
from builder.gate import Text, judge, measure  # noqa: E402
from builder.gguf_file import GgufFile  # noqa: E402
from builder.quantise import copy, fit, quantise, readable  # noqa: E402
from builder.source import Folder, Origin, Repository, room  # noqa: E402
from builder.stages import Report, Stages, size_of  # noqa: E402
from builder.versions import versions  # noqa: E402
from coldsnap.desk.bake import AS_IS, SCHEMES, configure  # noqa: E402
from coldsnap.errors import BakeError, ColdsnapError  # noqa: E402
from coldsnap.snapshot import push  # noqa: E402
from coldsnap.snapshot.manifest import (  # noqa: E402
    Bake,
    Manifest,
    Quality,
    Quantization,
    Source,
    load_manifest,
    verify,
    write_manifest,
)


def bake(options: argparse.Namespace) -> tuple[Path, Manifest]:
    """Make the snapshot that `options` ask for; return its folder and manifest."""
    out = _out(options)
    standing = _standing(out)
    calibration = _calibration(options)
    text = Text.read(options.gate_text, options.gate_tokens, options.gate_prompts)
    stages = Stages(out.with_name(f".{out.name}.bake"))
    with stages.open():
        stages.forget(since="resolve", unless={"model": options.model, "revision": options.revision})
        origin = _origin(options, out)
        source = origin.pin(stages)
        if standing is not None:
            _same(options, out, standing, source, calibration)
            judge(_quality(standing), options.max_kl, options.max_ppl_ratio)
            stages.remove()
            return out, standing
        checkpoint = origin.checkpoint(stages)

        scheme = schemes.choose(options.scheme, checkpoint)
        schemes.check(scheme, checkpoint, options.group_size)
        how = SCHEMES[scheme]
        if calibration and not how.fitted:
            fitted = " or ".join(name for name, each in SCHEMES.items() if each.fitted)
            raise BakeError(f"--calibrate: {scheme} has nothing to fit; use it with {fitted}")
        if options.keep and how.preset is None:
            raise BakeError(f"--keep: {scheme} leaves every layer as it is; leave it out")
        quantization = Quantization(
            scheme=scheme,
            ignore=schemes.left_alone(checkpoint, options.keep) if how.preset else (),
            method="compressed-tensors" if how.preset else checkpoint.quant_method,
            group_size=options.group_size if how.grouped else None,
            calibration=calibration,
        )
        snapshot = stages.work / "snapshot"
        stages.forget(
            since="quantise", unless={"source": source.model_dump(), "as": quantization.model_dump(mode="json")}
        )
        _quantised(options, stages, checkpoint, quantization, snapshot)

        stages.forget(since="check", unless={"text": text.digest, "tokens": text.tokens, "prompts": text.prompts})
        quality = Quality(**stages.run("check", partial(_check, checkpoint, scheme, snapshot, text)))
        judge(quality, options.max_kl, options.max_ppl_ratio)

        _write(
            options,
            stages,
            origin=origin,
            source=source,
            quantization=quantization,
            quality=quality,
            source_bytes=checkpoint.size,
            snapshot=snapshot,
        )
        snapshot.rename(out)
        manifest = load_manifest(out)
        stages.remove()
    return out, manifest


def _out(options: argparse.Namespace) -> Path:
    if options.out is not None:
        return Path(options.out).absolute()
    name = re.sub(r"[^a-z0-9.]+", "-", Path(options.model).name.lower().removesuffix(".gguf")).strip("-.")
    return ROOT / "snapshots" / (f"{name}-{options.scheme}" if options.scheme else name)


def _standing(out: Path) -> Manifest | None:
    if not out.exists():
        return None
    if not (out / "coldsnap.json").exists():
        raise BakeError(f"{out}: is there already and is no snapshot; remove it or name another --out")
    return load_manifest(out)


def _same(options: argparse.Namespace, out: Path, standing: Manifest, source: Source, calibration: str | None) -> None:
    """Raise unless the snapshot that stands at `out` is the one asked for, undamaged."""
    quantization = standing.quantization
    if not (
        standing.source == source
        and quantization.scheme == (options.scheme or quantization.scheme)
        and quantization.group_size in {None, options.group_size}
        and quantization.calibration == calibration
        and all(fnmatch.filter(quantization.ignore, pattern) for pattern in options.keep)
        and standing.served_model_name == _served(options)
        and standing.engine_args == dict(options.engine_args)
    ):
        raise BakeError(f"{out}: holds another snapshot already; remove it or name another --out")
    verify(out, standing)


def _origin(options: argparse.Namespace, out: Path) -> Origin:
    path = Path(options.model).absolute()
    if path.exists():
        if options.revision is not None:
            raise BakeError(f"--revision: {options.model} is here, not on the hub, and has none; leave it out")
        return Folder(path, out, options.scheme, options.group_size) if path.is_dir() else GgufFile(path, out)
    if path.suffix == ".gguf":
        raise BakeError(f"{options.model}: expected a GGUF file here, found none")
    return Repository(options.model, options.revision, out)


def _served(options: argparse.Namespace) -> str:
    path = Path(options.model).absolute()
    name = path.name.removesuffix(".gguf") if path.exists() else options.model
    return str(options.served_name or name)


def _calibration(options: argparse.Namespace) -> str | None:
    if options.calibrate is None:
        return None
    try:
        digest = blake3(options.calibrate.read_bytes()).hexdigest()
    except OSError as error:
        raise BakeError(f"--calibrate: {options.calibrate}: cannot be read: {error.strerror}") from error
    return f"{options.calibrate_method} on up to {options.calibrate_samples} lines of a file with BLAKE3 {digest}"


def _quantised(
    options: argparse.Namespace, stages: Stages, checkpoint: Checkpoint, quantization: Quantization, snapshot: Path
) -> None:
    size = schemes.estimate(quantization.scheme, checkpoint, options.group_size)
    partial_ = snapshot.with_suffix(".partial")

    def make() -> Report:
        shutil.rmtree(partial_, ignore_errors=True)
        shutil.rmtree(snapshot, ignore_errors=True)
        room(snapshot, size)
        if SCHEMES[quantization.scheme].preset is None:
            copy(checkpoint, partial_)
        elif options.calibrate:
            fit(
                checkpoint,
                partial_,
                quantization,
                method=options.calibrate_method,
                data=options.calibrate,
                samples=options.calibrate_samples,
            )
        else:
            quantise(checkpoint, partial_, quantization.scheme, quantization.ignore, options.group_size)
        readable(partial_)
        partial_.rename(snapshot)
        return {}

    stages.run("quantise", make, total=size, done=partial(size_of, partial_))


def _check(checkpoint: Checkpoint, scheme: str, snapshot: Path, text: Text) -> Report:
    """Read the snapshot's headers and measure its quality."""
    baked = Checkpoint.read(snapshot)
    quantised = SCHEMES[scheme].preset is not None
    if (quantised or scheme == AS_IS) and not baked.quant_method:
        raise BakeError(f"{snapshot}/config.json: expected a quantization_config, found none")
    if quantised:
        quality = measure(checkpoint, snapshot, text)
    elif scheme == AS_IS:
        quality = Quality(not_measured="the source is quantised already; there is no original to compare it with")
    else:
        quality = Quality(not_measured="the weights are the original's")
    return quality.model_dump(mode="json")


def _write(
    options: argparse.Namespace,
    stages: Stages,
    *,
    origin: Origin,
    source: Source,
    quantization: Quantization,
    quality: Quality,
    source_bytes: int,
    snapshot: Path,
) -> None:
    started = time.monotonic()

    def how() -> Bake:
        seconds = stages.seconds | {"manifest": round(time.monotonic() - started, 3)}
        return Bake(seconds=seconds, source_bytes=source_bytes, license=origin.license, quality=quality)

    def write() -> Report:
        write_manifest(
            snapshot,
            source=source,
            quantization=quantization,
            served_model_name=_served(options),
            engine_args=dict(options.engine_args),
            versions=versions(),
            bake=how,
        )
        return {}

    stages.run("manifest", write, again=True)


def _quality(manifest: Manifest) -> Quality:
    return manifest.bake.quality if manifest.bake else Quality(not_measured="the snapshot was baked without")


def report(out: Path, manifest: Manifest) -> str:
    """Return what was made, for the terminal."""
    quality = _quality(manifest)
    before = manifest.bake.source_bytes if manifest.bake else 0
    lines = {
        "snapshot": str(out),
        "digest": manifest.digest,
        "source": f"{manifest.source.repo} {manifest.source.revision}",
        "scheme": f"{manifest.quantization.scheme}, {len(manifest.quantization.ignore)} modules left as they were",
        "on disk": f"{before:,} -> {manifest.size:,} bytes ({manifest.size / before:.0%})",
    }
    if quality.not_measured is not None:
        lines["quality"] = f"not measured: {quality.not_measured}"
    else:
        lines |= {
            "perplexity": f"{quality.original_perplexity} -> {quality.perplexity} on {quality.text}",
            "mean KL": f"{quality.mean_kl} nats a token, {quality.tokens} tokens",
            "agreement": f"{quality.top1_agreement:.1%} of tokens, "
            f"{quality.greedy_identical} of {quality.greedy_prompts} greedy answers",
        }
    return "\n".join(f"{name:<10} {value}" for name, value in lines.items())


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="coldsnap bake", description="Turn a model into a snapshot.")
    configure(parser)
    try:
        options = parser.parse_args()
        out, manifest = bake(options)
        print(report(out, manifest))
        if options.push:
            print(f"{'pushed':<10} {push.shown(out, options.push)}")
    except ColdsnapError as error:
        print(f"coldsnap: {error.message}", file=sys.stderr)
        return 1
    except OSError as error:  # the disk: full after all, read-only, no permission
        print(f"coldsnap: {error.filename or 'the bake'}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
