"""Bad configs: each is refused with one line that has the value, what is allowed, and what to do."""

import math
import os
import subprocess
import sys

import pytest
from runs import REPOSITORY

from tritale.training.config import RunConfig, divisors, flatten, parse

NUMBERS = {  # values outside the limits of a key
    "data.stories": ["0", "-1", "1e30", "10" + "0" * 30],
    "data.validation_stories": ["0", "-1", "99999999"],
    "data.vocab_size": ["0", "-1", "261", "1000000000"],
    "model.vocab_size": ["0", "-1", "1000000000"],
    "model.n_layer": ["0", "-1", "1000000"],
    "model.n_head": ["0", "-1", "1000000000"],
    "model.n_kv_head": ["0", "-1", "1000000000"],
    "model.head_dim": ["0", "-1", "1000000"],
    "model.width": ["0", "-1", "10000000"],
    "model.mlp_width": ["0", "-1", "100000000"],
    "model.context": ["0", "1", "-1", "1000000000000"],
    "model.rope_theta": ["0", "-1", "1e30"],
    "model.norm_eps": ["0", "-1", "1e30"],
    "model.window": ["0", "-1", "1000000000000"],
    "model.init_std": ["0", "-1", "1e30"],
    "train.max_steps": ["0", "-1", "1e6", "10000000000000"],
    "train.global_batch": ["0", "-1", "1000000000000000"],
    "train.micro_batch": ["0", "-1", "1000000000000000"],
    "train.context": ["0", "1", "-1", "1000000000000"],
    "train.grad_clip": ["0", "-1", "1e-30"],
    "train.z_loss": ["-1", "2"],
    "train.validate_every": ["0", "-1"],
    "train.sample_every": ["-1"],
    "train.checkpoint_every": ["0", "-1"],
    "train.keep_last": ["-1"],
    "train.ema": ["0.4", "1", "-1"],
    "train.max_bad_steps": ["0", "-1"],
    "train.spike": ["-1"],
    "data.replay_share": ["-0.1", "1"],
    "data.emphasis": ["0.5", "-1", "1e30"],
    "data.cut_share": ["-0.1", "1.1"],
    "lora.rank": ["-1", "1025", "1.5"],
    "lora.alpha": ["0", "-1", "1e30"],
    "dpo.beta": ["0", "-1", "1e30"],
    "dpo.sft_weight": ["-1", "1e30"],
    "train.profile": ["-1"],
    "optim.lr": ["0", "-1", "1e38"],
    "optim.embedding_lr": ["0", "-1", "1e38"],
    "optim.momentum": ["1", "-1"],
    "optim.weight_decay": ["-1", "100"],
    "optim.warmup_steps": ["-1"],
    "optim.decay_fraction": ["-0.1", "1.1"],
    "optim.min_lr_ratio": ["-0.1", "1.1"],
    "log.every": ["0", "-1"],
    "log.sample_tokens": ["0", "-1"],
    "seed": ["-1", str(2**63)],
}
OTHERS = {
    "optim.betas": ["0.9", "[0.9]", "[0.9, 0.9, 0.9]", "[0.9, 1]", "[.nan, 0.9]", "[a, b]", "null"],
    "data.document_mask": ["yes please", "2", "null", "nan"],
    "train.compile": ["yes please", "2", "null", "nan"],
    "model.preset": ["huge", "null", "3"],
    "train.precision": ["bf32", "null", "16"],
    "optim.matrices": ["sgd", "null"],
    "optim.schedule": ["linear", "null"],
    "log.wandb": ["yes", "null"],
    "log.swanlab": ["yes", "null"],
    "log.tensorboard": ["online", "null"],
    "resume": ["no", "null"],
    "out_dir": ["", " ", "a\0b", "a\nb", "~/runs", "$HOME/runs", "s3://bucket/run", "out/run ", "null", "a\udcff"],
    "data.source": ["", "a\0b", "~/data", "https://host/data", "built_in", "Built-In", "None"],
    "lora.targets": ["q_proj", "[]", "[lm_head]", "[q_proj, embed_tokens]", "[1]", "null"],
    "log.prompts": ["hello", "[1]", "null", "{a: 1}", "[[小兔]]", "[小兔", '["\\ud800"]'],
    "log.project": ["", " ", "\udcff"],
}
CASES = [(key, value) for key, values in {**NUMBERS, **OTHERS}.items() for value in values]
CASES += [(key, value) for key in NUMBERS for value in (".nan", "many", "[1]", "true")]
CASES += [(key, "-.inf") for key in NUMBERS]
CASES += [("train.max_steps", value) for value in ("1e3", "1k", "1,000", "1.5", "10%", "1/3", "on", "~", "1e400", "-0", "{}", "'800'")]
CASES += [("optim.lr", value) for value in ("2e-3s", "1e-400", "0,002", "2e−3", "0x1p-3")]
CASES += [("optim.betas", value) for value in ("0.9,0.95", "(0.9, 0.95)", "{a: 1}", "[true, false]", "[-0.1, 0.9]")]


def refusal(*arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        parse(list(arguments))
    assert isinstance(exit.value.code, str) and len(exit.value.code.splitlines()) == 1 and len(exit.value.code) < 400
    return exit.value.code


def test_there_are_200_bad_values():
    assert len(CASES) >= 200


@pytest.mark.parametrize("key, value", CASES)
def test_a_bad_value_is_refused_with_the_values_that_are_allowed(key, value):
    message = refusal(f"--{key}={value}")
    assert message.startswith(f"train.py: {key} is ") and ("; it must be " in message or "; choose one of " in message)
    assert "; the default is " in message or ", or null" in message or "; choose one of " in message


def test_every_number_has_limits_and_every_default_is_within_them():
    flat = flatten(RunConfig())
    assert {k for k, v in flat.items() if type(v) in (int, float)} <= NUMBERS.keys()
    assert math.isinf(parse(["--train.grad_clip=.inf"]).train.grad_clip)


@pytest.mark.parametrize(
    "text, message",
    [
        ("train:\n  max_steps: 100\n  max_steps: 200\n", "sets train.max_steps twice (the second time in line 3); keep one"),
        ("seed: 1\nseed: 2\n", "sets seed twice"),
        ('{"seed": 1, "seed": 2}', "sets seed twice"),
        ("train.max_steps: 300\ntrain:\n  max_steps: 400\n", "sets train.max_steps twice (the second time in line 3)"),
        ("train: {}\nmodel: {}\ntrain: {}\n", "sets train twice"),
        ("train:\n  max_steps: 10:30\n", "10:30 is not a decimal number"),
        ("train:\n  max_steps: 0100\n", "0100 is not a decimal number"),
        ("config: other.yaml\n", "a config file cannot name another"),
        ("d: &d {max_steps: 3}\ntrain:\n  <<: *d\n", "unknown config key"),
        ("train:\n  <<: {max_steps: 3}\n", "line 2: unknown config key 'train.<<': YAML's merge keys are not supported"),
        ("train:\n  __path__: x\n", "line 2: unknown config key 'train.__path__'"),
        ("train:\n  class_path: os.system\n", "unknown config key 'train.class_path'"),
        ("yes: 1\n", "unknown config key 'yes'"),
        ("[a]: 1\n", "unknown config key"),
        ("out_dir: {{ x }}\n", "unhashable key"),
        ("train..max_steps: 1\n", "did you mean 'train.max_steps'"),
        ("Train:\n  max_steps: 10\n", "unknown config key 'Train'; did you mean 'train'?"),
        ("train:\n  max-steps: 10\n", "did you mean 'train.max_steps'"),
        ("train: &t\n  max_steps: *t\n", "train.max_steps is"),
        ("seed: 1\0\n", "is not valid YAML"),
        ("optim:\n  betas: !!python/tuple [0.9, 0.95]\n", "could not determine a constructor"),
        ("out_dir: !!binary aGVsbG8=\n", "out_dir is b'hello'; it must be the path of a folder"),
        ("", "must hold sections as a mapping"),
        ("- 1\n", "must hold sections as a mapping"),
        ("train: 3\n", "must hold train as a mapping"),
        ("train: null\n", "must hold train as a mapping"),
        ("train: [\n", "is not valid YAML"),
        ("train:\n\tmax_steps: 3\n", "is not valid YAML"),
        ("a: " + "[" * 3000 + "]" * 3000, "is not valid YAML"),
        ("seed: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("---\nseed: 1\n---\nseed: 2\n", "is not valid YAML"),
        ("seed: " + "9" * 5000 + "\n", "Exceeds the limit"),
        ("1: 2\n", "unknown config key '1'"),
        ("train:\n  max_stesp: 3\n", "unknown config key 'train.max_stesp'; did you mean 'train.max_steps'?"),
        ("train:\n  grad_clip: inf\n", "train.grad_clip is inf; it must be a number from 1e-06 to .inf; the default is 1"),
        ("out_dir: null\n", "out_dir is null; it must be the path of a folder"),
        ("out_dir: 小兔\n".encode("gbk"), "is not UTF-8 text"),
        ("seed: 1\n".encode("utf-16"), "is not UTF-8 text"),
        ('{"text": "从前"}\n' * 100_000, "is longer than 1,000,000 characters, so it is no config; give a YAML file such as"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refusal("--config", str(path))


@pytest.mark.parametrize("locale", ["C", "zh_CN.GBK"])  # the second, if it is not installed, is the first
def test_a_config_file_is_utf8_in_every_locale(locale, tmp_path):
    (tmp_path / "run.yaml").write_text('log:\n  prompts: ["小兔", é🐰]\n', encoding="utf-8")
    code = "from tritale.training.config import parse; print(ascii(parse(['--config', 'run.yaml']).log.prompts))"
    environment = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == ascii(("小兔", "é🐰")) + "\n", done.stderr


@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_a_missing_file_is_named(path):
    assert f"--config {path!r}: " in refusal("--config", path) and "give a YAML file" in refusal(f"--config={path}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--optim.learning_rate", "3"], "did you mean 'optim.lr'"),
        (["--lr", "1"], "did you mean 'optim.lr'"),
        (["--train.batch_size", "8"], "did you mean 'train.global_batch'"),
        (["--epochs", "3"], "did you mean 'train.max_steps'"),
        (["--model.hidden_size", "64"], "did you mean 'model.width'"),
        (["--max_steps", "3"], "did you mean 'train.max_steps'"),
        (["--model.n_layers", "3"], "did you mean 'model.n_layer'"),
        (["--train.learning_rate", "1"], "did you mean 'optim.lr'"),
        (["--device", "cpu"], "CUDA_VISIBLE_DEVICES= uses the CPU"),
        (["--dropout", "0.1"], "there is no dropout"),
        (["--train", "3"], "are sections of keys"),
        (["--log.prompts+=x"], "unknown config key 'log.prompts+'; did you mean 'log.prompts'?"),
        (["--zzz", "1"], "unknown config key 'zzz'; python train.py --help lists all keys"),
        (["--processes", "2"], "tritale train --processes N starts several processes"),
        (["--train.max_steps", "10:30"], "10:30 is not a decimal number"),
        (["--train.max_steps=010"], "010 is not a decimal number"),
        (["stray"], "unrecognized arguments: stray"),
        (["--train.max_steps"], "expected one argument"),
        (["--dpo.beta=3"], "the keys of dpo have no effect with objective cross_entropy; set objective dpo"),
        (["--data.replay_share=0.5"], "data.replay_share has no effect without data.replay; set that to a folder"),
        (["--optim.warmup_steps=800"], "optim.warmup_steps (800) must be less than train.max_steps (800); try 80"),
        (["--train.micro_batch=3"], "train.micro_batch (3) must divide train.global_batch (8); try --train.micro_batch 2"),
    ],
)
def test_an_unknown_key_or_argument_is_refused_with_what_was_meant(arguments, message):
    assert message in refusal(*arguments)


def test_divisors():
    assert [divisors(n) for n in (1, 12, 16, 97)] == [[1], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16], [1, 97]]
