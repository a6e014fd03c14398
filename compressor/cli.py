"""The command line: one command per job; each parses, calls one function, and says what came out."""

from __future__ import annotations

import sys
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from compressor import cli_build, cli_device, cli_gate, cli_pages, cli_search, console
from compressor.console import CLOTHES, Console, Threads, command
from compressor.result import Result

app = typer.Typer(
    name="vitrim",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings=console.HELP,
    help="A trained Vision Transformer in; the smallest, fastest, proven model for one edge device out.",
    epilog="\b\nFirst steps:\n  vitrim compress demo --mlp-ratio 0.5 --qk-ratio 0.5 --out b\n  vitrim verify b",
)

app.add_typer(cli_pages.app)
app.add_typer(cli_device.app)
app.add_typer(cli_search.app)
app.add_typer(cli_gate.app)
app.add_typer(cli_build.app)

MODEL_HELP = "demo, a timm or transformers folder, a vitrim bundle, a .safetensors/.pth file with --arch, or timm:NAME."
ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle folder or .zip.", show_default=False)]
Either = Annotated[
    str, typer.Argument(metavar="BUNDLE|MODEL", help="A bundle, or a model to run in float.", show_default=False)
]
Arch = Annotated[str | None, typer.Option(help="Architecture of a bare weights file, e.g. deit_tiny_patch16_224.")]
ImageSize = Annotated[int | None, typer.Option(help="Resample position embeddings to this input size (pixels).")]
Target = Annotated[
    str | None, typer.Option(help="Target to run on; default: the bundle's first one available, or ort.")
]
On = Annotated[str, typer.Option(help="Where to run: local, ssh://user@host[:port], adb://SERIAL, or a named device.")]


class Pruner(StrEnum):
    """Pruning algorithms."""

    corp = "corp"
    obs = "obs"


def _version(asked: bool) -> None:
    if asked:
        from compressor import __version__

        print(f"vitrim {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None:
    pass


@command(app, "doctor", "vitrim doctor --json", "vitrim doctor --install bpu")
def doctor(
    console: Console,
    install: Annotated[
        str | None, typer.Option(help="Create the environment of a vendor's compiler: bpu, qnn, rknn or tensorrt-rtx.")
    ] = None,
) -> Result:
    """Say which targets can run here, and what to install for the others."""
    from compressor import doctor

    return doctor.install(install, console.note) if install else doctor.examine()


@command(
    app,
    "inspect",
    "vitrim inspect demo",
    "vitrim inspect my_model/",
    "vitrim inspect weights.pth --arch deit_small_patch16_224",
    "vitrim inspect my_model/ --target bpu",
)
def inspect_model(
    console: Console,
    model: ModelPath,
    arch: Arch = None,
    image_size: ImageSize = None,
    target: Annotated[str | None, typer.Option(help="Also say what will not run on this accelerator.")] = None,
    chip: Annotated[str, typer.Option(help="Its chip, as the compiler calls it (default: the target's first).")] = "",
) -> Result:
    """Show what a checkpoint is: family, sizes per block, parameters, MACs, preprocessing. Nothing in it is executed."""
    from compressor import checkpoint, show
    from compressor.errors import ConfigError
    from compressor.loading import load_model
    from compressor.placement import place

    if chip and target is None:
        raise ConfigError("--chip must go with --target, got no target.")
    loaded = load_model(model, arch=arch, image_size=image_size)
    facts = checkpoint.describe(loaded)
    if target is None:
        return Result(facts, show.model(facts))
    placed = place(loaded, target, chip)
    return Result({**facts, **placed}, [*show.model(facts), *show.placement(placed)])


@command(
    app,
    "compress",
    "vitrim compress demo --out b",
    "vitrim compress my_model/ --data photos/ --eval val/ --mlp-ratio 0.5 --qk-ratio 0.5 --target openvino --out b",
)
def compress(
    console: Console,
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP, show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Bundle to write.", show_default=False)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration images: a folder, .npz, or demo (default; right for the demo model alone). Never random."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Target, repeatable (default ort): ort, openvino, tensorrt, bpu, rknn, qnn; see `vitrim doctor`."
        ),
    ] = None,
    eval: Annotated[
        str | None, typer.Option(help="Labelled images to measure accuracy on; never used to choose anything.")
    ] = None,
    mlp_ratio: Annotated[float | None, typer.Option(help="Fraction of MLP hidden units removed (default 0).")] = None,
    qk_ratio: Annotated[float | None, typer.Option(help="Fraction of query/key dimensions removed.")] = None,
    vo_ratio: Annotated[
        float | None, typer.Option(help="Fraction of value/output dimensions removed (obs only).")
    ] = None,
    head_ratio: Annotated[
        float | None, typer.Option(help="Fraction of every block's heads removed (obs only).")
    ] = None,
    drop_blocks: Annotated[
        int | None, typer.Option(help="Whole blocks removed, least important first (obs only).")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(help="What ranks blocks: output (default, their effect) or entropy (of weights, no data)."),
    ] = None,
    target_macs: Annotated[
        float | None, typer.Option(help="Share of MACs to keep; sizes are chosen per block, which beats ratios.")
    ] = None,
    target_params: Annotated[float | None, typer.Option(help="Share of parameters to keep, likewise.")] = None,
    damping: Annotated[
        str | None,
        typer.Option(help="How strongly fits are held to the dense weights, or auto (default): by held-out error."),
    ] = None,
    pruner: Annotated[Pruner | None, typer.Option(help="obs (default) or corp, the published method.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="auto (default): the fastest that agrees; or fp32, bf16, fp16, w8a8, w8a16, w6a6, w4a8, w4a4, w8a32, w4a32."
        ),
    ] = None,
    quantizer: Annotated[str | None, typer.Option(help="vitrim (default), or nncf where the target offers it.")] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(help="Percent of classes integers must keep; else layers stay in float (default 98)."),
    ] = None,
    calib_size: Annotated[int | None, typer.Option(help="Calibration images used, at most (default 512).")] = None,
    select: Annotated[
        str | None, typer.Option(help="How they are picked: random (default), k_centre or coarse_to_fine.")
    ] = None,
    match: Annotated[
        str | None, typer.Option(help="Pick images like those behind this file of `vitrim fingerprint`.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="YAML file of these options; flags override it.")] = None,
    arch: Arch = None,
    image_size: ImageSize = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every random choice (default 0).")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads, for the work and for the latency (default 1).")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
    zip: Annotated[bool, typer.Option("--zip", help="Write the bundle as one .zip file.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Do every stage again.")] = False,
    device: On = "local",
    require_npu: Annotated[
        bool, typer.Option("--require-npu", help="Exit 1 where a compiler leaves an operation to the CPU.")
    ] = False,
) -> Result:
    """Prune, quantize, lower, verify, profile and bundle a model: the main job."""
    given = dict(locals())
    from compressor import show
    from compressor.cache import Cache, default_folder
    from compressor.compiled import fallbacks, require_compilers
    from compressor.errors import ConfigError
    from compressor.inventory import default_file, resolve
    from compressor.options import number_or_auto
    from compressor.output import file_or_folder
    from compressor.pipeline import Tools, with_runnable
    from compressor.pipeline import compress as run
    from compressor.race import race_here
    from compressor.recipe import Recipe, from_yaml, override
    from compressor.remote import race_on

    if out is None:
        raise ConfigError("--out must name the bundle to write.", hint="For example: --out my_bundle")
    given["damping"] = number_or_auto(damping)
    flags = {f.name: given[f.name] for f in fields(Recipe) if f.name != "targets"}
    plan = override(from_yaml(recipe) if recipe else Recipe(), {**flags, "targets": tuple(target) if target else None})
    if not plan.model:
        raise ConfigError(
            "MODEL must be given, on the command line or in the recipe.", hint="Try: vitrim compress demo --out b"
        )
    if plan.data == Recipe.data and data is None and plan.model != "demo":
        console.note(CLOTHES)
    if (runnable := with_runnable(plan)) != plan:
        console.note("Target ort is added: what is measured, and golden, has to run here.")
        plan = runnable
    if require_npu:
        require_compilers(plan.targets)
    cache, where = Cache(None if no_cache else default_folder()), resolve(device, default_file())
    race = race_here if where is None else race_on(where, console.note)
    with file_or_folder(out, force=force, zipped=zip or out.suffix == ".zip") as folder:
        result = run(plan, folder, Tools(cache, console.progress, race))
    result = {"bundle": str(out), **{k: v for k, v in result.items() if k != "bundle"}}
    left = fallbacks(result["compiled"]) if require_npu else []
    return Result(result, [*show.compressed(result), *left], exit_code=1 if left else 0)


@command(app, "fingerprint", "vitrim fingerprint photos/ --model my_model/ --out device.json")
def fingerprint(
    console: Console,
    images: Annotated[str, typer.Argument(metavar="DIR", help="The device's images.", show_default=False)],
    out: Annotated[Path, typer.Option(help="File to write.", show_default=False)],
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "demo",
    arch: Arch = None,
    components: Annotated[int, typer.Option(min=1, help="Gaussians of the mixture.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the fit.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing --out.")] = False,
) -> Result:
    """Describe a device's images by a Gaussian mixture, for `compress --match`: no image leaves the device."""
    from calibration.fingerprint import as_json
    from compressor.loading import load_model
    from compressor.output import check_file, write_text
    from compressor.stages import fingerprint_images

    check_file(out, force=force)
    found = fingerprint_images(images, load_model(model, arch=arch), components, seed, console.progress)
    write_text(out, as_json(found))
    facts = {"fingerprint": str(out), "images": found.images, "components": components, "model": found.model}
    return Result(
        facts, [f"Wrote {out}: {components} Gaussians over {found.images} images, no image and no feature of one"]
    )


@command(
    app,
    "profile",
    "vitrim profile b --target openvino --per-op",
    "vitrim profile demo --threads 2 --json",
    "vitrim profile b --device ssh://pi@192.168.1.20 --json",
)
def profile(
    console: Console,
    source: Either,
    target: Target = None,
    threads: Threads = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images per inference.")] = 1,
    streams: Annotated[
        int, typer.Option(min=0, max=256, help="Also measure the throughput of this many sessions at once.")
    ] = 0,
    per_op: Annotated[bool, typer.Option("--per-op", help="Add the runtime's own table of operations.")] = False,
    arch: Arch = None,
    device: On = "local",
) -> Result:
    """Measure the latency distribution of a bundle or model on a target."""
    from compressor import show
    from compressor.inference import Source, profile_source
    from compressor.inventory import default_file, resolve

    asked, where = Source(source, target, threads, arch), resolve(device, default_file())
    if where is None:
        with console.working("profile"):
            data = profile_source(asked, batch=batch, per_op=per_op, streams=streams)
    else:
        from compressor.remote import profile_on

        data = profile_on(where, asked, console.note, batch=batch, per_op=per_op, streams=streams)
    return Result(data, show.profile(data))


@command(app, "eval", "vitrim eval b --data val/", "vitrim eval b --data demo:eval --target openvino --json")
def evaluate(
    console: Console,
    source: Either,
    data: Annotated[
        str,
        typer.Option(
            help="Images: a folder of class folders, .npz, or demo:eval; without labels, agreement alone.",
            show_default=False,
        ),
    ],
    target: Target = None,
    threads: Threads = 1,
    reference: Annotated[
        str | None, typer.Option(help="Model to agree with (default: the bundle's own float model).")
    ] = None,
    arch: Arch = None,
) -> Result:
    """Measure accuracy with its 95 % interval, and agreement with the reference."""
    from compressor import show
    from compressor.inference import Source, evaluate_source

    found = evaluate_source(Source(source, target, threads, arch), data, reference, console.progress)
    return Result(found, show.accuracy(found))


@command(app, "run", "vitrim run b photo.jpg", "vitrim run b *.png --top 3 --json")
def run_images(
    console: Console,
    bundle: BundlePath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="Classes shown.")] = 5,
    target: Target = None,
    threads: Threads = 1,
) -> Result:
    """Classify images with a bundle; needs no torch."""
    from compressor.bundle import Bundle

    opened = Bundle.open(bundle)
    name = target or opened.default_target
    opened.session(name, threads)
    results = [
        {"image": str(i), "top": [{"label": n, "probability": p} for n, p in opened.top(i, top, name, threads=threads)]}
        for i in images
    ]
    lines = [f"{r['image']}: " + ", ".join(f"{t['label']} {t['probability']:.1%}" for t in r["top"]) for r in results]  # type: ignore[index]
    return Result({"bundle": str(bundle), "target": name, "results": results}, lines)


@command(app, "verify", "vitrim verify b", "vitrim verify b.zip --target ort --signers allowed_signers --json")
def verify(
    console: Console,
    bundle: BundlePath,
    target: Annotated[str | None, typer.Option(help="Check this target only.")] = None,
    signers: Annotated[
        Path | None, typer.Option(help="OpenSSH allowed signers: the bundle must be signed by one.")
    ] = None,
    device: On = "local",
) -> Result:
    """Check a bundle: hashes, signature, then golden inputs through every available target against the recorded outputs."""
    from compressor.inference import verify_bundle
    from compressor.inventory import default_file, resolve

    where = resolve(device, default_file())
    if where is None:
        with console.working("verify"):
            return verify_bundle(bundle, target, signers)
    from compressor.remote import verify_on

    return verify_on(where, bundle, target, signers, console.note)


def main() -> None:
    """Entry point of the `vitrim` command."""
    sys.exit(console.main(app))
