"""Every bad checkpoint is refused in one sentence that says where, what, which rule and what was got; none is executed."""

from __future__ import annotations

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file

from compressor.checkpoint import load
from compressor.errors import CheckpointError, ConfigError, UnsupportedModel
from tests import peers
from tests.core.checkpoints import config, edit, good_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return good_folders(tmp_path_factory.mktemp("good"))


def in_config(**changes):
    return lambda folder: config(folder / "config.json", **changes)


def in_index(**changes):
    return lambda folder: config(folder / "model.safetensors.index.json", **changes)


def in_tensors(**changes):
    """Dots are written as double underscores; a function changes the tensor."""

    def damage(folder):
        file = folder / "model.safetensors"
        tensors = load_file(file)
        edit(
            file,
            {n.replace("__", "."): c(tensors[n.replace("__", ".")]) if callable(c) else c for n, c in changes.items()},
        )

    return damage


def other_type(kind):
    """The same tensors under another model type and its prefix."""

    def damage(folder):
        file = folder / "model.safetensors"
        edit(
            file,
            {n.replace("vit.", f"{kind}."): t for n, t in load_file(file).items()}
            | {n: None for n in load_file(file) if "vit." in n},
        )
        config(folder / "config.json", model_type=kind)

    return damage


def processor(**content):
    return lambda folder: (folder / "preprocessor_config.json").write_text(json.dumps(content))


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def delete(name):
    return lambda folder: (folder / name).unlink()


def cut(share):
    def damage(folder):
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return damage


def promise(rows, columns):
    """A safetensors file whose table of contents names more than the file holds."""

    def damage(folder):
        token = {"dtype": "F32", "shape": [1, 1, 24], "data_offsets": [0, 96]}
        pos = {"dtype": "F32", "shape": [1, rows, columns], "data_offsets": [96, 96 + 4 * rows * columns]}
        content = json.dumps({"cls_token": token, "pos_embed": pos}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(content)) + content + bytes(96))

    return damage


def without(prefix):
    """The file without the tensors whose names begin like that."""

    def damage(folder):
        file = folder / "model.safetensors"
        edit(file, {name: None for name in load_file(file) if name.startswith(prefix)})

    return damage


def spoil(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


BIG = torch.full((24,), 1e30)
LS, FC1 = "blocks__1__ls1__gamma", "blocks__1__mlp__fc1__weight"

# fmt: off
BAD_FOLDERS = {
    # --- files
    "no config": ("timm", delete("config.json"), CheckpointError, r"a checkpoint.s folder must hold config.json, got none"),
    "no weights": ("timm", delete("model.safetensors"), CheckpointError, r"must hold one of model.safetensors, .*, got none"),
    "config is no JSON": ("timm", text("config.json", "{"), CheckpointError, r"config.json: the file must hold JSON, got "),
    "config is a list": ("timm", text("config.json", "[]"), CheckpointError, r"must hold a JSON object, got list"),
    "config is nested too deep": ("timm", text("config.json", "[" * 10**6), CheckpointError, r"must hold JSON, got "),
    "config names no layout": ("timm", text("config.json", "{}"), CheckpointError, r"architecture \(timm\), .* is missing"),
    "header cut": ("timm", cut(0.01), CheckpointError, r"must be a complete safetensors file, got "),
    "data cut": ("timm", cut(0.9), CheckpointError, r"must be a complete safetensors file, got "),
    "empty weights": ("timm", text("model.safetensors", ""), CheckpointError, r"must be a complete safetensors file, got "),
    "git-lfs pointer": ("timm", text("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        CheckpointError, r"must be a complete safetensors file"),
    "promised terabytes": ("timm", promise(10**6, 10**6),
        CheckpointError, r"must be a complete safetensors file, got "),
    "index without map": ("shards", in_index(weight_map=[]), CheckpointError, r"weight_map must be an object .*, got list"),
    "shard missing": ("shards", in_index(weight_map={"a": "model-9.safetensors"}),
        CheckpointError, r"every shard must be a file of this folder, got 'model-9.safetensors'"),
    "shard elsewhere": ("shards", in_index(weight_map={"a": "../shards/config.json"}),
        CheckpointError, r"every shard must be a file of this folder, got '../shards/config.json'"),
    # --- tensors
    "tensor missing": ("timm", in_tensors(**{FC1: None}), CheckpointError, r"'blocks.1.mlp.fc1.weight' is missing"),
    "bias missing": ("timm", in_tensors(blocks__0__attn__qkv__bias=None),
        CheckpointError, r"'blocks.0.attn.qkv.bias' is missing"),
    "one LayerScale missing": ("timm", in_tensors(**{LS: None}), CheckpointError, r"'blocks.1.ls1.gamma' is missing"),
    "transformers tensor missing": ("transformers", in_tensors(vit__encoder__layer__1__output__dense__bias=None),
        CheckpointError, r"'vit.encoder.layer.1.output.dense.bias' is missing"),
    "classifier's bias missing": ("transformers", in_tensors(classifier__bias=None),
        CheckpointError, r"'classifier.bias' is missing"),
    "block missing": ("timm", without("blocks.0."),
        CheckpointError, r"block 0 is missing, though block 1 is there"),
    "no blocks": ("timm", without("blocks."),
        CheckpointError, r"at least one transformer block, got none"),
    "wrong shape": ("timm", in_tensors(**{FC1: lambda t: t[:, :-1]}),
        CheckpointError, r"'blocks.1.mlp.fc1.weight' must have shape \(96, 24\), got \(96, 23\)"),
    "wrong rank": ("timm", in_tensors(patch_embed__proj__weight=torch.ones(24, 192)),
        CheckpointError, r"4 non-empty axes, got \(24, 192\)"),
    "empty axis": ("timm", in_tensors(head__weight=torch.ones(0, 24)), CheckpointError, r"2 non-empty axes, got \(0, 24\)"),
    "NaN": ("timm", in_tensors(**{FC1: spoil(float("nan"))}),
        CheckpointError, r"'blocks.1.mlp.fc1.weight' must be finite in float32"),
    "infinity": ("timm", in_tensors(**{LS: spoil(float("-inf"))}), CheckpointError, r"'blocks.1.ls1.gamma' must be finite"),
    "too large for float32": ("timm", in_tensors(norm__weight=torch.full((24,), 1e300, dtype=torch.float64)),
        CheckpointError, r"'norm.weight' must be finite in float32"),
    "overflow when folded": ("timm", in_tensors(blocks__0__ls1__gamma=BIG, blocks__0__attn__proj__weight=BIG.expand(24, 24)),
        CheckpointError, r"'blocks.0.proj.weight' must be finite"),
    "integers": ("timm", in_tensors(norm__bias=torch.ones(24, dtype=torch.int8)), CheckpointError, r"float64, got int8"),
    "float8": ("timm", in_tensors(norm__bias=lambda t: t.to(torch.float8_e4m3fn)), CheckpointError, r"got float8_e4m3fn"),
    "two names for one": ("timm", in_tensors(blocks__0__gamma_1=torch.ones(24)),
        CheckpointError, r"'blocks.0.gamma_1' and .* must not both"),
    "too few positions": ("timm", in_tensors(pos_embed=lambda t: t[:, :7]),
        CheckpointError, r"4 x 4 patches and up to 1 prefix tokens, got 7"),
    # --- config against tensors
    "heads do not divide": ("timm", in_config(model_args__num_heads=5),
        CheckpointError, r"number of heads must divide the attention width 24, got 5"),
    "more heads than width": ("timm", in_config(model_args__num_heads=10**12),
        CheckpointError, r"must divide .* 24, got 1000000000000"),
    "zero heads": ("timm", in_config(model_args__num_heads=0),
        CheckpointError, r"model_args.num_heads must be greater than 0, got 0"),
    "heads are text": ("timm", in_config(model_args__num_heads="x"),
        CheckpointError, r"model_args.num_heads must be .*, got 'x'"),
    "absurd depth": ("timm", in_config(model_args__depth=10**12),
        CheckpointError, r"model_args.depth must be what .* say, 2, got 10+"),
    "absurd width": ("timm", in_config(model_args__embed_dim=10**12), CheckpointError, r"embed_dim must be .*, 24, got 10+"),
    "absurd image": ("timm", in_config(model_args__img_size=10**9), CheckpointError, r"must cover 125000000 x 125000000 patches"),
    "no LayerScale though stated": ("distilled", in_config(model_args__init_values=1e-5),
        CheckpointError, r"model_args.init_values must be .*, False, got True"),
    "class count": ("timm", in_config(num_classes=7),
        CheckpointError, r"num_classes must be what the tensors of .* say, 5, got 7"),
    "label count": ("timm", in_config(label_names=["a", "b"]), CheckpointError, r"labels must have 5 names, got 2"),
    "label keys": ("timm", in_config(label_names={"a": "b"}),
        CheckpointError, r"label_names must map class numbers to names, got key 'a'"),
    "unknown architecture": ("timm", in_config(architecture="deit3_smal_patch16_224"),
        ConfigError, r"got 'deit3_smal_patch16_224'"),
    "architecture is a number": ("timm", in_config(architecture=3),
        CheckpointError, r"config.json: architecture must be a valid string, got 3"),
    "crop": ("timm", in_config(pretrained_cfg__crop_pct=0),
        CheckpointError, r"pretrained_cfg.crop_pct must be greater than 0, got 0"),
    "mean": ("timm", in_config(pretrained_cfg__mean=[0.1, 0.2]),
        CheckpointError, r"pretrained_cfg.mean must have 3 values, .*\[0.1, 0.2\]"),
    "std": ("timm", in_config(pretrained_cfg__std=[0, 0, 0]),
        ConfigError, r"Preprocess.std must be positive, got \(0.0, 0.0, 0.0\)"),
    "hidden layers": ("transformers", in_config(num_hidden_layers=12),
        CheckpointError, r"num_hidden_layers must be what the tensors say, 2, got 12"),
    "heads missing": ("transformers", in_config(num_attention_heads=None),
        CheckpointError, r"config.json: num_attention_heads is missing"),
    "transformers labels": ("transformers", in_config(id2label={"0": "a"}),
        CheckpointError, r"id2label must name classes 0 to 4, got 1 names"),
    "bias though none": ("transformers", in_config(qkv_bias=False),
        UnsupportedModel, r"bias' is not used by the model that its config or arch describes"),
    "crop larger than image": ("transformers", processor(size=32, do_center_crop=True, crop_size=33),
        CheckpointError, r"crop_size must be in 1..32, got 33"),
    "free image shape": ("transformers", processor(size={"shortest_edge": 32}), CheckpointError, r"size must give both sides"),
    "longest edge": ("transformers", processor(size={"longest_edge": 32}),
        CheckpointError, r"size must be .*, got \{'longest_edge': 32\}"),
    "resample": ("transformers", processor(resample=5), CheckpointError, r"resample must be one of \[0, 1, 2, 3\], got 5"),
    "vitrim version": ("vitrim", in_config(version=2), CheckpointError, r"config.json: version must be 1, got 2"),
    "vitrim extra key": ("vitrim", in_config(extra=2), CheckpointError, r"config.json: extra is not a known key"),
    "vitrim key in spec": ("vitrim", in_config(spec__depth=2), CheckpointError, r"config.json: spec.depth is not a known key"),
    "vitrim heads": ("vitrim", in_config(spec__blocks__0__heads=0),
        CheckpointError, r"BlockSpec.heads must be at least 1, got 0"),
    "vitrim absurd width": ("vitrim", in_config(spec__blocks__0__mlp_dim=10**12),
        CheckpointError, r"'blocks.0.fc1.weight' must have shape \(1000000000000, 24\), got \(96, 24\)"),
    "vitrim channels": ("vitrim", in_config(preprocess__channels="L", preprocess__mean=[0], preprocess__std=[1]),
        CheckpointError, r"must give .*, got \(32, 32\) L"),
    "vitrim image size": ("vitrim", in_config(preprocess__size=[28, 28]),
        CheckpointError, r"must give \(32, 32\) .*, got \(28, 28\)"),
    "vitrim tensor missing": ("vitrim", in_tensors(pos=None), CheckpointError, r"'pos' is missing"),
    "vitrim tensor too many": ("vitrim", in_tensors(more=torch.ones(1)),
        CheckpointError, r"'more' is not part of the model its config"),
    "vitrim labels": ("vitrim", in_config(labels=["a"]), CheckpointError, r"labels must have 5 names, got 1"),
    # --- networks that are not plain Vision Transformers
    "unknown tensor": ("timm", in_tensors(norm_pre__weight=torch.ones(24)),
        UnsupportedModel, r"'norm_pre.weight' is not part of a plain"),
    "tensor without use": ("timm", in_tensors(head_dist__bias=torch.ones(5)),
        UnsupportedModel, r"'head_dist.bias' is not used by the model"),
    "argument that changes the network": ("timm", in_config(model_args__pool_include_prefix=True),
        UnsupportedModel, r"model_args.pool_include_prefix must be False, got True"),
    "max pooling": ("timm", in_config(model_args__global_pool="max"),
        UnsupportedModel, r"global_pool must be token or avg, got 'max'"),
    "activation": ("transformers", in_config(hidden_act="relu"), UnsupportedModel, r"hidden_act must be one of .*, got 'relu'"),
    "other model type": ("transformers", other_type("vit_msn"), UnsupportedModel, r"model_type must be one of .*, got 'vit_msn'"),
    "swin": ("transformers", in_config(model_type="swin"),
        UnsupportedModel, r"'vit.embeddings.cls_token' is not part of a plain"),
    "distilled without heads": ("distilled", without("head"),
        UnsupportedModel, r"must have two heads"),
    "four channels": ("transformers", in_tensors(vit__embeddings__patch_embeddings__projection__weight=torch.ones(24, 4, 8, 8)),
        UnsupportedModel, r"must read 1 or 3 channels, got 4"),
    "channel count": ("gray", in_tensors(patch_embed__proj__weight=torch.ones(24, 3, 8, 8)),
        CheckpointError, r"model_args.in_chans must be what the tensors of .* say, 3, got 1"),
}
# fmt: on


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder_is_refused(case, folders, tmp_path):
    layout, damage, error, message = BAD_FOLDERS[case]
    folder = tmp_path / layout
    shutil.copytree(folders / layout, folder)
    damage(folder)
    with pytest.raises(error) as caught:
        load(str(folder))
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "mobilevit_xs", "vit_xsmall_patch16_clip_224", "resnet18"]
)
def test_other_networks_are_refused_by_their_first_unknown_tensor(name, tmp_path):
    module = peers.import_timm().create_model(name)
    state = module.state_dict()
    torch.save(state, tmp_path / "other.pth")
    known = ("patch_embed.proj.", "cls_token", "pos_embed")
    first = next(n for n in state if not n.startswith(known))
    with pytest.raises(
        UnsupportedModel, match=f"tensor '{re.escape(first)}' is not part of a plain Vision Transformer"
    ):
        load(str(tmp_path / "other.pth"), arch=name)


def test_arguments_are_refused(folders, tmp_path):
    bare = str(folders / "bare.safetensors")
    name = "deit3_small_patch16_224"
    cases = [
        (CheckpointError, {"source": str(tmp_path / "nothing")}, r"nothing: no such file or folder"),
        (CheckpointError, {"source": ""}, r"must hold config.json, got none|no such file"),
        (ConfigError, {"source": bare}, r"arch must name the architecture of a bare file, got none"),
        (
            ConfigError,
            {"source": bare, "arch": "deit3_smoll_patch16_224"},
            r"known names, got 'deit3_smoll_patch16_224'",
        ),
        (
            UnsupportedModel,
            {"source": bare, "arch": "vit_b_16"},
            r"tensor 'blocks.0.attn.proj.bias' is not part of a plain",
        ),
        (ConfigError, {"source": str(folders / "timm"), "arch": name}, r"arch must not be given with a config.json"),
        (ConfigError, {"source": "demo", "image_size": 0}, r"image_size must be positive, got 0 x 0"),
        (ConfigError, {"source": "demo", "image_size": (28, -4)}, r"image_size must be positive, got 28 x -4"),
        (ConfigError, {"source": "demo", "image_size": 3}, r"image_size must be at least one patch"),
        (ConfigError, {"source": "demo", "image_size": 10**9}, r"at most 65536 patches, got 250000000 x 250000000"),
        (ConfigError, {"source": str(folders / "vitrim"), "image_size": 10**9}, r"at most 65536 patches"),
        (CheckpointError, {"source": __file__, "arch": name}, r"must end in .safetensors or .pth, .*, got '.py'"),
    ]
    for error, arguments, message in cases:
        with pytest.raises(error, match=message):
            load(**arguments)
    with pytest.raises(ConfigError) as caught:
        load(bare, arch="deit3_smoll_patch16_224")
    assert "deit3_small_patch16_224" in caught.value.hint
    with pytest.raises(CheckpointError) as pointer:
        (tmp_path / "lfs.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        load(str(tmp_path / "lfs.safetensors"), arch=name)
    assert "git lfs pull" in pointer.value.hint
