"""From a jsonl file to a story: python examples/own_text.py [OUT_DIR]

Three commands: prepare the text, train a very small model, generate. It takes less than a minute on a CPU. The model is far too small
and trains far too short to write well; remove the options of train.py for a real run. Requires: pip install -e '.[data]'
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tritale.inference import LLM

REPOSITORY = Path(__file__).resolve().parents[1]
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()

# ---- the text: one JSON object per line --------------------------------------------------------------------------------------------------
friends, places, things = "小猫 小狗 小兔 小熊 小鸟".split(), "河边 山上 花园 森林 海边".split(), "苹果 风筝 贝壳 蘑菇 帽子".split()
stories = [
    f"从前，{a}和{b}是好朋友。有一天，它们在{place}玩，看见了一个{thing}。{a}说：“我们一起分享吧！”{b}很高兴。"
    for a in friends for b in friends for place in places for thing in things if a != b
]  # fmt: skip
out.mkdir(parents=True, exist_ok=True)
lines = [json.dumps({"story": story}, ensure_ascii=False) for story in stories]
(out / "stories.jsonl").write_text("\n".join(lines), encoding="utf-8")


def run(*arguments: str | Path) -> None:
    print("+ python", *arguments, flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], cwd=REPOSITORY, check=True)


# ---- prepare, train, generate ------------------------------------------------------------------------------------------------------------
data, trained = out / "data", out / "run"
source = ("--input", out / "stories.jsonl", "--text-key", "story", "--out", data)
run("-m", "tritale", "prepare", *source, "--vocab-size", "600", "--val-documents", "20")
small = ("--model.preset", "tiny", "--train.max_steps", "60", "--train.global_batch", "8", "--train.micro_batch", "8")
quick = ("--train.compile", "false", "--train.validate_every", "60", "--train.checkpoint_every", "60", "--optim.warmup_steps", "6")
run("train.py", "--data.source", data, "--out_dir", trained, *small, *quick, "--log.prompts", '["从前，"]', "--log.sample_tokens", "40")

llm = LLM.load(trained)
print("从前，" + llm.generate("从前，", max_new_tokens=60, seed=1))
