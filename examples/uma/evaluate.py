"""Measure the experts, and the base alone, on held-out scenes; write the demo's samples.

Prints the table of README.md and stores the same numbers, with eight scenes, in samples.json.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from corpus import EXPERTS, FLAWS, Scene, answer, make_scene, prompt, shared_skills
from peft import PeftModel
from tokenizer import BASE_DIR
from train_experts import ADAPTERS_DIR, draw
from transformers import AutoModelForCausalLM, AutoTokenizer
from world import FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable

SAMPLES = BASE_DIR.parent / "samples.json"
ALL_SKILLS = [skill for field in FIELDS for skill in field.skills]
Scores = dict[str, float]


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0 of nothing."""
    return part / whole if whole else 0.0


def overlap(found: list[list[str]], truth: list[list[str]]) -> tuple[float, float, float]:
    """Precision, recall and F1 over all cases together."""
    hits = sum(len(set(f) & set(t)) for f, t in zip(found, truth, strict=True))
    precision = ratio(hits, sum(len(set(f)) for f in found))
    recall = ratio(hits, sum(len(set(t)) for t in truth))
    return precision, recall, ratio(2 * precision * recall, precision + recall)


def has(fact: str, text: str) -> bool:
    """Whether a fact stands in a text as whole words."""
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text) is not None


def parse_json(text: str) -> dict:
    """The object in a text, or an empty one."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def words(value: object) -> list[str]:
    """The strings of a JSON list; nothing of anything else."""
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def score_analysis(scenes: list[Scene], texts: list[str]) -> Scores:
    """Valid JSON, the skills in it, and how many of all its values are right."""
    parsed = [parse_json(text) for text in texts]
    truth = [json.loads(answer("job-analysis", scene)) for scene in scenes]
    found = [words(p.get("skills")) for p in parsed]
    precision, recall, f1 = overlap(found, [t["skills"] for t in truth])
    right = sum(p.get(k) == t[k] for p, t in zip(parsed, truth, strict=True) for k in t)
    return {
        "JSON valid": ratio(sum(map(bool, parsed)), len(texts)),
        "skills precision": precision,
        "skills recall": recall,
        "skills F1": f1,
        "values right": ratio(right, sum(map(len, truth))),
    }


def score_review(scenes: list[Scene], texts: list[str]) -> Scores:
    """Strength and gap lines against the true ones, facts in them included."""

    def lines(text: str, gaps: bool) -> list[str]:
        good, _, bad = text.partition("\n\nGaps\n")
        part = bad if gaps else good.removeprefix("Strengths\n")
        return [line for line in part.split("\n") if line.startswith("- ")]

    truth = [answer("profile-review", scene) for scene in scenes]
    scores = {}
    for name, gaps in (("strengths", False), ("gaps", True)):
        found = [lines(t, gaps) for t in texts]
        scores[f"{name} F1"] = overlap(found, [lines(t, gaps) for t in truth])[2]
    same = sum(a == b for a, b in zip(texts, truth, strict=True))
    return scores | {"whole answer right": ratio(same, len(texts))}


def proposal_facts(scene: Scene) -> list[str]:
    """What a tailored draft must carry."""
    job, person = scene.job, scene.profile
    facts = [job.client, job.project, f"{person.years} years", job.budget, job.duration]
    facts += [person.name, person.past, *shared_skills(job, person)]
    return facts + ([f"{person.rate} per hour"] if person.rate else [])


def score_proposal(scenes: list[Scene], texts: list[str]) -> Scores:
    """Facts carried into the draft, and skills it claims that the profile does not have."""
    carried = [[has(f, t) for f in proposal_facts(s)] for s, t in zip(scenes, texts, strict=True)]
    shared = [shared_skills(s.job, s.profile) for s in scenes]
    claimed = [[k for k in ALL_SKILLS if has(k, text)] for text in texts]
    precision, recall, _ = overlap(claimed, shared)
    return {
        "facts carried": ratio(sum(map(sum, carried)), sum(map(len, carried))),
        "drafts with every fact": ratio(sum(map(all, carried)), len(carried)),
        "matching skills recall": recall,
        "skills claimed that match": precision,
        "asks a question": ratio(sum("?" in text for text in texts), len(texts)),
    }


def score_feedback(scenes: list[Scene], texts: list[str]) -> Scores:
    """Flaws named: each of the six counted on its own, and the whole set. An answer that is no
    review at all (neither heading) has no flaw right, present or absent."""
    heads = ("To improve\n", "Ready to send\n")
    labels = ["Greeting", "Skills", "Experience", "Rate", "Question", "Length"]
    names = dict(zip(FLAWS, labels, strict=True))
    named = [[f for f in FLAWS if f"- {names[f]}:" in text] for text in texts]
    formed = [text.startswith(heads) for text in texts]
    cases = list(zip(scenes, texts, named, formed, strict=True))
    right = [ok and (f in n) == (f in s.draft.flaws) for s, _, n, ok in cases for f in FLAWS]
    whole = [ok and set(n) == set(s.draft.flaws) for s, _, n, ok in cases]
    lacking = [s.draft.missing for s in scenes]
    told = [[k for k in ALL_SKILLS if has(k, text)] for text in texts]
    return {
        "flaw accuracy": ratio(sum(right), len(right)),
        "flaws F1": overlap(named, [s.draft.flaws for s in scenes])[2],
        "exact set of flaws": ratio(sum(whole), len(whole)),
        "missing skills F1": overlap(told, lacking)[2],
    }


SCORERS: dict[str, Callable[[list[Scene], list[str]], Scores]] = {
    "job-analysis": score_analysis,
    "profile-review": score_review,
    "proposal": score_proposal,
    "feedback": score_feedback,
}


class Writer:
    """Greedy, batched generation by the base with one adapter or none."""

    def __init__(self, base: Path, adapters: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(model, adapters / EXPERTS[0], EXPERTS[0])
        for expert in EXPERTS[1:]:
            self.model.load_adapter(adapters / expert, expert)
        self.model.eval()

    def write(self, prompts: list[str], expert: str | None) -> list[str]:
        """The answers to user messages."""
        if expert is None:
            with self.model.disable_adapter():
                return self._generate(prompts)
        self.model.set_adapter(expert)
        return self._generate(prompts)

    @torch.inference_mode()
    def _generate(self, prompts: list[str]) -> list[str]:
        batch = self.tokenizer.apply_chat_template(
            [[{"role": "user", "content": text}] for text in prompts],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = self.model.generate(**batch, max_new_tokens=160, do_sample=False)
        texts = ids[:, batch["input_ids"].shape[1] :]
        return self.tokenizer.batch_decode(texts, skip_special_tokens=True)


def held_out(expert: str, cases: str, count: int) -> list[Scene]:
    """Held-out scenes of one expert: `tuning` ones guide the recipes, `final` ones are reported."""
    rng = random.Random(f"{cases} {expert}")
    return [draw(expert, rng, held=True) for _ in range(count)]


def demo_scenes(writer: Writer, count: int = 8) -> list[dict]:
    """Held-out scenes for the demo, with each expert's prompt and greedy answer."""
    rng = random.Random("demo")
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = make_scene(rng, held=True)
        fresh = all(scene.job.field is not other.job.field for other in scenes)
        if fresh and 1 < len(scene.draft.flaws) < 5:
            scenes.append(scene)
    answers = {e: writer.write([prompt(e, s) for s in scenes], e) for e in EXPERTS}
    return [
        {
            "title": f"{scene.job.title} ({scene.job.client})",
            "post": scene.post,
            "profile": scene.profile_text,
            "draft": scene.draft.text,
            "prompts": {e: prompt(e, scene) for e in EXPERTS},
            "answers": {e: answers[e][i] for e in EXPERTS},
        }
        for i, scene in enumerate(scenes)
    ]


def main() -> None:
    """Evaluate, print the table, write the samples."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", choices=["tuning", "final"], default="final")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--base", type=Path, default=BASE_DIR)
    parser.add_argument("--adapters", type=Path, default=ADAPTERS_DIR)
    parser.add_argument("--out", type=Path, default=SAMPLES)
    parser.add_argument("--show", type=int, default=0, help="print this many answers of each")
    args = parser.parse_args()
    torch.set_num_threads(2)
    writer = Writer(args.base, args.adapters)
    table = []
    print("| Expert | Measure | Expert | Base alone |\n| --- | --- | ---: | ---: |")
    for expert in EXPERTS:
        scenes = held_out(expert, args.cases, args.count)
        prompts = [prompt(expert, scene) for scene in scenes]
        texts, alone = writer.write(prompts, expert), writer.write(prompts, None)
        scores, floor = SCORERS[expert](scenes, texts), SCORERS[expert](scenes, alone)
        for name, value in scores.items():
            print(f"| {expert} | {name} | {value:.1%} | {floor[name]:.1%} |", flush=True)
            row = {"expert": expert, "measure": name, "value": round(value, 4)}
            table.append(row | {"base_alone": round(floor[name], 4)})
        for case in zip(prompts[: args.show], texts, alone, strict=False):
            print("\n".join(("", *case)).replace("\n", "\n    "))
    content = {"eval": {"cases_per_expert": args.count, "scores": table}}
    content["scenes"] = demo_scenes(writer)
    args.out.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
