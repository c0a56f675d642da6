import json
from dataclasses import replace
from pathlib import Path

import pytest

from compress.errors import CompressError
from compress.recipe import Calibration, Gate, KvCache, Modifier, Recipe, load, presets, resolve

GOOD = """\
version: 1
seed: 7
head: keep
modifiers:
  - type: rtn
    scheme: w8a8
    targets: ["*.q_proj", "re:.*mlp.*"]
    ignore: []
kv_cache: {dtype: fp32}
gate: {mode: off}
"""
GROUPS = "version: 1\nmodifiers: [{{type: rtn, scheme: {}}}]\n"
CAL = "version: 1\ncalibration: {}\nmodifiers: [{{type: gptq, scheme: w4a8}}]\n"
RTN = "modifiers: [{type: rtn, scheme: w8a8}]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_reads_every_field(tmp_path: Path) -> None:
    assert load(write(tmp_path, GOOD)) == Recipe(
        name="mine",
        version=1,
        seed=7,
        head="keep",
        modifiers=(
            Modifier(
                type="rtn",
                scheme="w8a8",
                scale="absmax",
                targets=("*.q_proj", "re:.*mlp.*"),
                ignore=(),
            ),
        ),
        kv_cache=KvCache(dtype="fp32"),
        gate=Gate(),
    )


def test_presets_are_the_files_of_a_folder() -> None:
    assert presets() == [
        "auto", "fp8", "sparse24-w8a8", "sparse50-w4a8", "sparse50-w8a8", "w4a16", "w4a16-awq",
        "w4a16-gptq", "w4a16-rtn", "w4a8", "w8a16", "w8a8",
    ]  # fmt: skip
    recipe = resolve("w8a8")
    assert (recipe.name, recipe.head, recipe.kv_cache.dtype) == ("w8a8", "int8", "int8")
    assert recipe.modifiers == (Modifier(type="rtn", scheme="w8a8", scale="absmax"),)


def test_defaults_are_the_presets(tmp_path: Path) -> None:
    assert load(write(tmp_path, "version: 1\n" + RTN)) == resolve("w8a8")


@pytest.mark.parametrize("name", presets())
def test_calibration_is_the_same_in_presets_and_by_default(name: str) -> None:
    assert resolve(name).calibration in (None, Calibration())


def test_groups_that_kernels_multiply(tmp_path: Path) -> None:
    for scheme, size in (("w4a8", 96), ("w4a16", 256)):
        recipe = load(write(tmp_path, GROUPS.format(f"{scheme}, group_size: {size}")))
        assert recipe.modifiers[0].group_size == size


def test_canonical_json_has_no_name_and_no_gate(tmp_path: Path) -> None:
    recipe = resolve(str(write(tmp_path, "version: 1\nseed: 0\n" + RTN)))
    assert recipe.canonical_json() == resolve("w8a8").canonical_json()
    assert recipe.sha256() == resolve("w8a8").sha256()
    assert set(json.loads(recipe.canonical_json())) == {
        "version", "seed", "head", "modifiers", "kv_cache", "calibration",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("version: 1\nmodifers: []\n", 2, "did you mean 'modifiers'?"),
        ("version: 1\nzzz: 1\n" + RTN, 2, "known: auto, calibration, gate, head"),
        (RTN + "version: 1\nversion: 1\n", 3, "has the key 'version' twice"),
        (RTN, 1, "the key 'version' is missing"),
        ("version: 1\n", 1, "the key 'modifiers' is missing"),
        ("version: 2\n" + RTN, 1, "recipes of version 1"),
        ("version: true\n" + RTN, 1, "must be a whole number"),
        ("version: 1\nseed: -3\n" + RTN, 2, "must be a whole number"),
        ("version: 1\nseed: 0x10\n" + RTN, 2, "must be a whole number"),
        ("version: 1\nhead: int4\n" + RTN, 2, "did you mean 'int8'?"),
        ("version: 1\nhead: [int8]\n" + RTN, 2, "head must be one word"),
        ("version: 1\nhead:\n" + RTN, 2, "head must be one word"),
        ("version: 1\nkv_cache: int8\n" + RTN, 2, "kv_cache must be a mapping"),
        ("version: 1\nkv_cache: {dtype: fp16}\n" + RTN, 2, "known: fp32, int8"),
        ("version: 1\ngate: {mode: maybe}\n" + RTN, 2, "gate.mode cannot be 'maybe'"),
        ("version: 1\ngate: {max_kl: 0}\n" + RTN, 2, "gate.max_kl must be a number above 0"),
        ("version: 1\ngate: {max_kl: .inf}\n" + RTN, 2, "gate.max_kl must be a number above 0"),
        ("version: 1\ngate: {max_drop: 2}\n" + RTN, 2, "gate.max_drop must be a number from 0"),
        ("version: 1\ngate: {documents: 7}\n" + RTN, 2, "gate.documents must be at least 8"),
        ("version: 1\ngate: {length: 1}\n" + RTN, 2, "gate.length must be at least 2"),
        ("version: 1\ngate: {max_kI: 1}\n" + RTN, 2, "did you mean 'max_kl'?"),
        ("version: 1\ngate: {restore: often}\n" + RTN, 2, "gate.restore cannot be"),
        ("version: 1\ngate: {speed: fast}\n" + RTN, 2, "gate.speed cannot be"),
        ("version: 1\ncalibration: {samples: 8}\n" + RTN, 2, "uses calibration"),
        ("version: 1\nmodifiers: []\n", 2, "modifiers is empty"),
        ("version: 1\nmodifiers: {type: rtn}\n", 2, "modifiers must be a list"),
        ("version: 1\nmodifiers: [rtn]\n", 2, "must be a mapping"),
        ("version: 1\nmodifiers:\n- {scheme: w8a8}\n", 3, "the key 'type' is missing"),
        ("version: 1\nmodifiers:\n- {type: rtn}\n", 3, "the key 'scheme' is missing"),
        (CAL.format("{samples: 8}"), 2, "the key 'source' is missing"),
        (CAL.format("{source: file}"), 2, "the key 'path' is missing"),
        (CAL.format("{source: generate, path: a}"), 2, "remove path"),
        (CAL.format("{source: generate, samples: 0}"), 2, "must be at least 1"),
        ("version: 1\nmodifiers: [{type: rtn, scheme: w4a8, group_size: 0}]\n", 2, "at least 1"),
        (GROUPS.format("w4a8, group_size: 48"), 2, "no group_size 48; there are 32, 64, 96, 128"),
        (GROUPS.format("w4a8, group_size: 256"), 2, "no group_size 256; there are 32, 64, 96"),
        (GROUPS.format("w4a16, group_size: 48"), 2, "no group_size 48; there are multiples of 32"),
        ("version: 1\nmodifiers: [{type: rtn, scheme: w8a8, group_size: 8}]\n", 2, "one symmetric"),
        ("version: 1\nmodifiers: [{type: rtn, scheme: w4a8, symmetric: 1}]\n", 2, "false, true"),
        ("version: 1\nmodifiers: [{type: rtn, scheme: w4a8, scale: max}]\n", 2, "'absmax'?"),
        ("version: 1\nmodifiers: [{type: rtn, scheme: w8a8, alpha: 1}]\n", 2, "has no key 'alpha'"),
        ("version: 1\nmodifiers: [{type: smoothquant, alpha: 2}]\n", 2, "from 0 to 1"),
        ("version: 1\nmodifiers: [{type: wanda}]\n", 2, "the key 'sparsity' is missing"),
        ("version: 1\nmodifiers: [{type: wanda, sparsity: half}]\n", 2, "from 0 to 1"),
        ("version: 1\nmodifiers: [{type: distill}]\n", 2, "distill is not available yet"),
        ("version: 1\nmodifiers: [{type: rtm, scheme: w8a8}]\n", 2, "did you mean 'rtn'?"),
        ("version: 1\nmodifiers: [{type: rtn, scheme: fp9}]\n", 2, "did you mean 'fp8'?"),
        ("version: 1\nmodifiers: [{type: rtn, scheme: fp8, group_size: 8}]\n", 2, "one symmetric"),
        (
            "version: 1\nmodifiers:\n- type: rtn\n  scheme: w8a8\n  tragets: [a]\n",
            5,
            "did you mean 'targets'?",
        ),
        (
            "version: 1\nmodifiers: [{type: rtn, scheme: w8a8, targets: q_proj}]\n",
            2,
            "targets must be a list",
        ),
        (
            "version: 1\nmodifiers:\n- type: rtn\n  scheme: w8a8\n  targets:\n  - 're:('\n",
            6,
            "not a regular expression",
        ),
        ("version: 1\nmodifiers: [\n", 3, "not valid YAML"),
        ("version: 1\n---\nversion: 1\n", 2, "not valid YAML"),
        ("- version\n", 1, "the recipe must be a mapping"),
        ("? [a]\n: 1\n", 1, "a key of the recipe must be one word"),
    ],
)
def test_errors_name_the_file_and_the_line(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(CompressError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gate(tmp_path: Path) -> None:
    text = "gate: {mode: enforce, max_kl: 0.1, data: a.txt, tasks: [b.jsonl], restore: true}\n"
    recipe = load(write(tmp_path, "version: 1\n" + text + "modifiers: [{type: rtn, scheme: w8a8}]"))
    assert recipe.gate == Gate(
        mode="enforce",
        max_kl=0.1,
        data=(f"{tmp_path}/a.txt",),
        tasks=(f"{tmp_path}/b.jsonl",),
        restore=True,
    )
    assert recipe.canonical_json() == replace(recipe, gate=Gate()).canonical_json()


def test_options_of_each_type(tmp_path: Path) -> None:
    text = """\
version: 1
calibration: {source: file, path: [a.txt, sub/b.jsonl], samples: 4, length: 32}
modifiers:
  - {type: smoothquant}
  - {type: sparsegpt, sparsity: [0.5, 0.25], structure: unstructured}
  - {type: gptq, scheme: w4a8, group_size: 64, actorder: none, scale: mse, symmetric: false}
"""
    recipe = load(write(tmp_path, text))
    folder = str(tmp_path)
    assert recipe.calibration == Calibration(
        source="file", paths=(f"{folder}/a.txt", f"{folder}/sub/b.jsonl"), samples=4, length=32
    )
    assert recipe.modifiers[0].alpha == 0.5
    assert recipe.modifiers[1].sparsity == (0.5, 0.25)
    gptq = recipe.modifiers[2]
    assert (gptq.group_size, gptq.actorder, gptq.symmetric) == (64, "none", False)
    assert (recipe.head, recipe.activations) == ("int8", "int8")
    assert folder not in recipe.canonical_json()


@pytest.mark.parametrize("name", presets())
def test_presets_never_run_a_cheaper_arithmetic_than_their_name_says(name: str) -> None:
    recipe = resolve(name)
    floats = "a16" in name or name == "fp8"
    assert recipe.activations == ("float" if floats else "int8")
    assert recipe.head == ("keep" if floats else "int8")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00x", b"a: \x01", b"[" * 5000])
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(CompressError, match=str(path)):
        load(path)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("w8a9", "did you mean 'w8a8'?"),
        ("fp9", "did you mean 'fp8'?"),
        ("nowhere.yaml", "cannot be read: No such file"),
    ],
)
def test_unknown_recipes(spec: str, message: str) -> None:
    with pytest.raises(CompressError) as caught:
        resolve(spec)
    assert message in str(caught.value)
