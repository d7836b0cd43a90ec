"""The cells of a litgpt notebook run on a run of this project when only the import is changed: `tritale.inference` for `litgpt`."""

import shutil

CELLS = (
    """
from litgpt import LLM

llm = LLM.load(model="../../Experiments/Output/pretrain/microstories/step-00001000")
llm.generate(
    prompt="汤姆和杰瑞是好朋友，",
    max_new_tokens=500,
    temperature=0.8,
    top_p=0.9,
    top_k=30,
)
""",
    """
import gc

prompt = "汤姆和杰瑞是好朋友，"
for i in range(20, 220, 20):
    llm = LLM.load(
        model=f"../../Experiments/Output/pretrain/microstories/step-{i*1000:08d}"
    )
    print(f"step-{i*1000:08d}")
    print("-" * 13)
    result = llm.generate(
        prompt=prompt,
        max_new_tokens=500,
        temperature=0.8,
        top_p=0,
        top_k=30,
    )
    result = prompt + "\\n".join(filter(lambda x: x.strip(), result.split("\\n")))
    print(result)
    print("*" * 100)
    print("\\n")
    del llm
    gc.collect()
""",
)


def test_the_cells_of_a_litgpt_notebook(tiny_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "Experiments/Output/pretrain/microstories"
    for step in (1000, *range(20_000, 220_000, 20_000)):
        shutil.copytree(tiny_run / "step-00000006", folder / f"step-{step:08d}")
    (tmp_path / "notes/day05").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "notes/day05")
    namespace: dict = {}
    for cell in CELLS:
        exec(cell.replace("from litgpt import", "from tritale.inference import"), namespace)
    *blocks, _ = capsys.readouterr().out.split("*" * 100)
    texts = {block.split("-" * 13 + "\n")[1] for block in blocks}
    assert len(blocks) == 10 and len(texts) == 1  # top_p=0 is greedy decoding: the same text each time
    assert texts.pop().startswith("汤姆和杰瑞是好朋友，")
