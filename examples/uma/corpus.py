"""Render the facts of `world.py` as posts, profiles, drafts and the four experts' answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from world import LEVELS, NEEDS, Job, Profile, article, listing, make_job, make_profile

if TYPE_CHECKING:
    import random

EXPERTS = ["job-analysis", "profile-review", "proposal", "feedback"]
LEVEL_LINES = {
    "entry": ["Beginners are welcome.", "This suits someone new to the trade."],
    "intermediate": [
        "Some years of practice are enough.",
        "You have done this kind of work before.",
    ],
    "expert": ["We want a senior person.", "Only seasoned people, please."],
}
GENERIC_GREETINGS = [
    "Dear Sir or Madam",
    "To whom it may concern",
    "Hello there",
    "Dear hiring team",
]
FLAWS = ["greeting", "skills", "experience", "rate", "question", "short"]


@dataclass(frozen=True)
class Draft:
    """A proposal as a freelancer wrote it, with what it lacks."""

    text: str
    greeting: str
    missing: list[str]
    flaws: list[str]


@dataclass(frozen=True)
class Scene:
    """One client, one freelancer and one draft between them."""

    job: Job
    profile: Profile
    post: str
    profile_text: str
    draft: Draft


def render_post(job: Job, rng: random.Random) -> str:
    """A job post: a headline and a paragraph in shuffled order."""
    project, skills = job.project, listing(job.skills)
    opening = [
        f"{job.client} is looking for help with {article(project)}.",
        f"We are {job.client} and we need {article(project)}.",
        f"At {job.client} we are planning {article(project)}.",
    ]
    wanted = [
        f"You should know {skills}.",
        f"Must have: {skills}.",
        f"The work calls for {skills}.",
    ]
    kind = ["per hour"] if job.hourly else ["fixed", "in total"]
    money = [f"The budget is {job.budget} {rng.choice(kind)}.", f"We pay {job.budget} {kind[0]}."]
    length = [f"The job should take {job.duration}.", f"We plan for {job.duration}."]
    lines = [rng.choice(group) for group in (wanted, money, length, LEVEL_LINES[job.level])]
    if job.nice:
        nice = listing(job.nice)
        lines.append(rng.choice([f"{nice} would be a plus.", f"It helps to know {nice}."]))
    lines += [rng.choice(NEEDS[need]) for need in job.needs]
    rng.shuffle(lines)
    return f"{job.title}\n{rng.choice(opening)} {' '.join(lines)}"


def render_profile(person: Profile, rng: random.Random) -> str:
    """A freelancer profile: name and role, then a paragraph of what it mentions."""
    skills, role = listing(person.skills), person.field.role
    years = f"{person.years} year{'s' if person.years > 1 else ''}"
    lines = [
        rng.choice([f"I have {years} of experience.", f"I have worked for {years}."]),
        rng.choice([f"My skills are {skills}.", f"I work with {skills}.", f"Skills: {skills}."]),
    ]
    gain = f", and {person.gain}" if person.gain else ""
    lines.append(rng.choice(["Last year", "Recently", "For a client"]) + f" I {person.past}{gain}.")
    if person.rate:
        hour = f"{person.rate} per hour"
        lines.append(rng.choice([f"My rate is {hour}.", f"I charge {hour}."]))
    if person.hours:
        lines.append(f"I am free {person.hours} hours a week.")
    if person.portfolio:
        lines.append(rng.choice(["My portfolio is attached.", "See my portfolio for samples."]))
    if person.certificate:
        lines.append(rng.choice(["I am certified.", "I hold a certificate in the field."]))
    rng.shuffle(lines)
    return f"{person.name}, {role}\n{' '.join(lines)}"


def shared_skills(job: Job, person: Profile) -> list[str]:
    """The skills of the post that the profile has too, in the order of the post."""
    return [s for s in job.skills if s in person.skills]


def render_draft(job: Job, person: Profile, rng: random.Random) -> Draft:
    """A draft with deliberate flaws, each drawn on its own."""
    flaws = [flaw for flaw in FLAWS[:5] if rng.random() < 0.4]
    named = list(job.skills)
    if "skills" in flaws:
        named.remove(rng.choice(named))
    missing = [s for s in job.skills if s not in named]
    if rng.random() < 0.12:
        named, missing = [], list(job.skills)
        flaws = ["greeting"] * ("greeting" in flaws) + FLAWS[1:]
    greeting = rng.choice([f"Hello {job.client} team", f"Dear {job.client}"])
    if "greeting" in flaws:
        greeting = rng.choice(GENERIC_GREETINGS)
    lines = _draft_lines(job, person, named, flaws, rng)
    end = rng.choice(["Best regards", "Kind regards", "Thank you"])
    text = f"{greeting},\n{' '.join(lines)}\n{end}, {person.first}"
    return Draft(text, greeting, missing, flaws)


def _draft_lines(
    job: Job, person: Profile, named: list[str], flaws: list[str], rng: random.Random
) -> list[str]:
    lines = [
        f"I would like to work on your {job.project}.",
        f"I saw your post on the {job.project}.",
    ]
    lines = [rng.choice(lines)]
    if "short" in flaws:
        return [*lines, rng.choice(["I can do it well.", "Please hire me.", "I can start now."])]
    skills = listing(named)
    lines.append(rng.choice([f"I know {skills} well.", f"I use {skills} every day."]))
    if "experience" not in flaws:
        field = person.field.name
        years = [
            f"I have {person.years} years in {field}.",
            f"In {person.years} years I {person.past}.",
        ]
        lines.append(rng.choice(years))
    if rng.random() < 0.5:
        lines.append(rng.choice(["I work hard and I am honest.", "I always finish what I start."]))
    if "rate" not in flaws:
        rate = person.rate or f"${rng.randrange(15, 95)}"
        lines.append(rng.choice([f"My rate is {rate} per hour.", f"I charge {rate} per hour."]))
    if "question" not in flaws:
        question = person.field.question
        lines.append(rng.choice(["May I ask:", "One question:"]) + f" {question}")
    else:
        lines.append(rng.choice(["I hope to hear from you.", "I am ready when you are."]))
    return lines


def make_scene(rng: random.Random, held: bool = False) -> Scene:
    """One scene from the training or the held-out side of the world."""
    job = make_job(rng, held)
    person = make_profile(rng, held, job)
    draft = render_draft(job, person, rng)
    return Scene(job, person, render_post(job, rng), render_profile(person, rng), draft)


def make_review_scene(rng: random.Random, held: bool = False) -> Scene:
    """A scene whose profile was drawn for no job, so that it may be weak in every way."""
    scene = make_scene(rng, held)
    person = make_profile(rng, held)
    return Scene(scene.job, person, scene.post, render_profile(person, rng), scene.draft)


def prompt(expert: str, scene: Scene) -> str:
    """The user message for one expert: its inputs under small headings, and no instruction."""
    post = f"## Job post\n{scene.post}"
    if expert == "job-analysis":
        return post
    if expert == "profile-review":
        return f"## Freelancer profile\n{scene.profile_text}"
    if expert == "proposal":
        return f"{post}\n\n## Freelancer profile\n{scene.profile_text}"
    return f"{post}\n\n## Draft proposal\n{scene.draft.text}"


def answer(expert: str, scene: Scene) -> str:
    """What the expert should write."""
    if expert == "job-analysis":
        return analysis(scene.job)
    if expert == "profile-review":
        strengths, gaps = review(scene.profile)
        return "Strengths\n" + "\n".join(strengths) + "\n\nGaps\n" + "\n".join(gaps)
    if expert == "proposal":
        return proposal(scene.job, scene.profile)
    return feedback(scene)


def analysis(job: Job) -> str:
    """The job as JSON, one key a line."""
    facts = {
        "title": job.title,
        "client": job.client,
        "level": job.level,
        "skills": job.skills,
        "nice_to_have": job.nice,
        "requirements": sorted(job.needs, key=list(NEEDS).index),
        "budget": job.budget_label,
        "duration": job.duration,
    }
    assert job.level in LEVELS
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in facts.items()]
    return "{\n" + ",\n".join(lines) + "\n}"


def review(person: Profile) -> tuple[list[str], list[str]]:
    """The strengths and the gaps of a profile, a line each."""
    good, gaps = [], []
    if person.years >= 3:
        good.append(f"- {person.years} years of experience in {person.field.name}")
    else:
        gaps.append(
            f"- Only {person.years} year{'s' * (person.years > 1)} of experience: show more"
        )
    if len(person.skills) >= 3:
        good.append(f"- A clear skill set: {listing(person.skills)}")
    else:
        gaps.append(f"- Few skills: only {listing(person.skills)}")
    if person.gain:
        good.append(f"- A measured result: {person.gain}")
    else:
        gaps.append("- No measured result: say what your work changed")
    if person.rate:
        good.append(f"- A clear rate of {person.rate} per hour")
    else:
        gaps.append("- No rate: say what an hour costs")
    if person.hours:
        good.append(f"- Clear availability: free {person.hours} hours a week")
    else:
        gaps.append("- No availability: say how many hours you can work")
    if not person.portfolio:
        gaps.append("- No portfolio: add two or three samples")
    if not person.certificate:
        gaps.append("- No certificate: add one if you have it")
    good.append(f"- Past work: {person.first} {person.past}")
    return good, gaps or ["- None: this profile is complete"]


def proposal(job: Job, person: Profile) -> str:
    """A tailored draft. Its wording follows the field and the facts, so it can be learned."""
    years, skills = f"{person.years} years", listing(shared_skills(job, person))
    opening = [
        f"Your {job.project} caught my eye: I have worked in {person.field.name} for {years}.",
        f"I would be glad to take on your {job.project}. I bring {years} of {person.field.name}.",
    ][len(job.field.name) % 2]
    match = "all" if len(shared_skills(job, person)) == len(job.skills) else "some"
    skill_line = {
        "all": f"You ask for {skills}, and I use them in my daily work.",
        "some": f"Of the skills you list, I know {skills} well.",
    }[match]
    gain = f", and {person.gain}" if person.gain else ""
    rate = f"My rate is {person.rate} per hour, and your" if person.rate else "Your"
    money = f"{rate} budget of {job.budget_label} over {job.duration} works for me."
    return (
        f"Hello {job.client} team,\n\n{opening} {skill_line} "
        f"Not long ago I {person.past}{gain}.\n\n"
        f"{money} One question before we start: {job.field.question}\n\n"
        f"Best regards,\n{person.name}"
    )


def feedback(scene: Scene) -> str:
    """What to improve in the draft, one line for each flaw."""
    draft, job = scene.draft, scene.job
    lines = {
        "greeting": f'- Greeting: write "Hello {job.client} team" instead of "{draft.greeting}".',
        "skills": f"- Skills: the post asks for {listing(draft.missing or job.skills)}, "
        "and the draft does not say so.",
        "experience": "- Experience: say how many years you have done this work.",
        "rate": "- Rate: say what you charge per hour.",
        "question": f"- Question: ask the client something about the {job.project}.",
        "short": "- Length: the draft is too short to win a client.",
    }
    found = [lines[flaw] for flaw in FLAWS if flaw in draft.flaws]
    if not found:
        return f"Ready to send\n- The draft answers the post from {job.client} well."
    return "To improve\n" + "\n".join(found)
