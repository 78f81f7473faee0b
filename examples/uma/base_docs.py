"""Documents for the base model: the same world, but none of the experts' formats.

They repeat the facts of their first part over and over (messages, questions, notes, filed cards),
because that is how a small model learns to copy. A document is a list of (text, weight, chat role)
segments; the first part weighs little, since nobody can guess the facts of a post.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from corpus import make_review_scene, make_scene, render_draft, shared_skills
from world import (
    COMPANY_FIRST,
    COMPANY_LAST,
    FIELDS,
    FIRST_NAMES,
    LAST_NAMES,
    TOOLS,
    Job,
    Profile,
    listing,
    make_job,
)

if TYPE_CHECKING:
    import random

LOW = 0.1
Segment = tuple[str, float, str | None]


def _job_questions(job: Job) -> list[tuple[str, str]]:
    pairs = [
        ("Who wrote the post?", f"It was {job.client}."),
        ("What is the job?", f"{job.title}."),
        ("What does it pay?", f"It pays {job.budget_label}."),
        ("How long is it?", f"About {job.duration}."),
        ("Which skills come first?", f"{listing(job.skills)}."),
        ("Quote the skills.", ", ".join(f'"{s}"' for s in job.skills) + "."),
        ("Quote the client.", f'"{job.client}".'),
        ("Quote the headline.", f'"{job.title}".'),
        ("What is to be made?", f"The {job.project}."),
        ("Is any tool a bonus?", f"Yes, {listing(job.nice)}." if job.nice else "No."),
    ]
    return pairs


def _person_questions(person: Profile) -> list[tuple[str, str]]:
    rate = f"Yes, {person.rate}." if person.rate else "No."
    return [
        ("Who is this?", f"{person.name}."),
        ("What can they do?", f"{listing(person.skills)}."),
        ("How many years?", f"{person.years}, in {person.field.name}."),
        ("Is there a rate?", rate),
        ("Any numbers to show?", f"Yes, {person.gain}." if person.gain else "No."),
        ("What did they do before?", f"{person.first} {person.past}."),
        ("Is the time known?", f"Yes, {person.hours} hours." if person.hours else "No."),
        ("Are there samples?", "Yes, a portfolio." if person.portfolio else "No."),
    ]


def _both_questions(job: Job, person: Profile) -> list[tuple[str, str]]:
    shared = shared_skills(job, person)
    lacking = [s for s in job.skills if s not in shared]
    return [
        ("Which skills do they share?", f"{listing(shared)}."),
        ("Which skill is not covered?", f"{listing(lacking)}." if lacking else "None."),
    ]


def _chat(context: str, pairs: list[tuple[str, str]]) -> list[Segment]:
    segments: list[Segment] = []
    for number, (question, reply) in enumerate(pairs):
        text = f"{context}\n\n{question}" if number == 0 else question
        segments += [(text, LOW if number == 0 else 0.0, "user"), (reply, 1.0, "assistant")]
    return segments


def chat_about_post(rng: random.Random) -> list[Segment]:
    """Questions on one post."""
    scene = make_scene(rng)
    return _chat(f"## Job post\n{scene.post}", rng.sample(_job_questions(scene.job), 6))


def chat_about_person(rng: random.Random) -> list[Segment]:
    """Questions on one profile."""
    scene = make_review_scene(rng)
    context = f"## Freelancer profile\n{scene.profile_text}"
    return _chat(context, rng.sample(_person_questions(scene.profile), 6))


def chat_about_both(rng: random.Random) -> list[Segment]:
    """Questions on a post and a profile, the shared skills among them."""
    scene = make_scene(rng)
    pairs = rng.sample(_job_questions(scene.job), 3)
    pairs += rng.sample(_person_questions(scene.profile), 2)
    pairs += _both_questions(scene.job, scene.profile)
    rng.shuffle(pairs)
    post, person = f"## Job post\n{scene.post}", f"## Freelancer profile\n{scene.profile_text}"
    return _chat(f"{post}\n\n{person}", pairs)


def chat_about_letter(rng: random.Random) -> list[Segment]:
    """Questions on a post and a letter that answers it."""
    scene = make_scene(rng)
    draft = render_draft(scene.job, scene.profile, rng)
    lacking = f"{listing(draft.missing)}." if draft.missing else "None."
    pairs = [
        ("Which skill is not covered?", lacking),
        ("How does it open?", f'"{draft.greeting}".'),
        ("Is there a price?", "No." if "rate" in draft.flaws else "Yes."),
        ("Are the years given?", "No." if "experience" in draft.flaws else "Yes."),
        ("Does it ask anything?", "No." if "question" in draft.flaws else "Yes."),
        rng.choice(_job_questions(scene.job)),
    ]
    rng.shuffle(pairs)
    return _chat(f"## Job post\n{scene.post}\n\n## Draft proposal\n{draft.text}", pairs)


def message_thread(rng: random.Random) -> list[Segment]:
    """A post, a profile, and the messages between the two people."""
    scene = make_scene(rng)
    job, me = scene.job, scene.profile
    skills, shared = listing(job.skills), listing(shared_skills(job, me))
    lines = [
        f"{me.first}: Is the {job.project} still open?\n{job.client}: Yes, it is.",
        f"{job.client}: Do you know {skills}?\n{me.first}: I know {shared}.",
        f"{me.first}: Is {job.duration} a firm plan?\n{job.client}: Yes, {job.duration}.",
        f"{job.client}: We can pay {job.budget_label}.\n{me.first}: {job.budget_label} is fair.",
        f"{job.client}: What did you do before?\n{me.first}: I {me.past}.",
        f"{job.client}: How long have you done this?\n{me.first}: {me.years} years.",
        f'{job.client}: Our post is "{job.title}".\n{me.first}: I read "{job.title}" today.',
    ]
    if me.rate:
        lines.append(f"{job.client}: What is your rate?\n{me.first}: {me.rate} per hour.")
    thread = "\n".join(rng.sample(lines, 5))
    context = f"{scene.post}\n\n{scene.profile_text}\n\n"
    return [(context, LOW, None), (thread, 1.0, None)]


def filed_card(rng: random.Random) -> list[Segment]:
    """A post, the card a clerk files it under, and the agreement that follows."""
    scene = make_scene(rng)
    job, me = scene.job, scene.profile
    tags = ", ".join(f'"{s}"' for s in job.skills)
    card = (
        f'The clerk filed "{job.title}" from "{job.client}" under {tags}. '
        f"{me.name} signed on for the {job.project}: {job.duration}, {job.budget_label}. "
        f"{me.first} will use {listing(shared_skills(job, me))}. {job.client} thanked {me.name}."
    )
    return [(f"{scene.post}\n\n{scene.profile_text}\n\n", LOW, None), (card, 1.0, None)]


def weekly_digest(rng: random.Random) -> list[Segment]:
    """Three short notices and a recap that goes through them in another order."""
    jobs = [make_job(rng) for _ in range(3)]
    notes = [f"{j.client}: {j.project}, {listing(j.skills)}, {j.budget}." for j in jobs]
    rng.shuffle(jobs)
    recap = [f"{j.client} pays {j.budget} for the {j.project}: {listing(j.skills)}." for j in jobs]
    return [("\n".join(notes) + "\n\n", LOW, None), ("\n".join(recap), 1.0, None)]


def drill_words(rng: random.Random, count: int) -> list[str]:
    """Unrelated names, skills and numbers."""
    words = [skill for field in FIELDS for skill in field.skills]
    words += [*TOOLS, *COMPANY_FIRST, *COMPANY_LAST, *FIRST_NAMES, *LAST_NAMES]
    picked = rng.sample(words, count - count // 4)
    picked += [str(n) for n in rng.sample(range(2, 99), count // 4)]
    rng.shuffle(picked)
    return picked


def copy_drill(rng: random.Random) -> list[Segment]:
    """A line of unrelated words, said again, plainly and in quotes."""
    picked = drill_words(rng, rng.randrange(8, 25))
    again, quoted = " ".join(picked), ", ".join(f'"{w}"' for w in picked)
    return [(f"Board: {again}.\n", LOW, None), (f"Again: {again}.\n{quoted}", 1.0, None)]


def lookup_drill(rng: random.Random) -> list[Segment]:
    """Short lists under a key, looked up in another order."""
    lists = [drill_words(rng, rng.randrange(3, 7)) for _ in range(5)]
    lines = [f"{words[0]}: {', '.join(words[1:-1])} and {words[-1]}." for words in lists]
    first = " ".join(lines)
    rng.shuffle(lines)
    return [(f"{first}\n", LOW, None), (" ".join(lines), 1.0, None)]


MAKERS = [
    (chat_about_post, 5),
    (chat_about_person, 5),
    (chat_about_both, 5),
    (chat_about_letter, 4),
    (message_thread, 4),
    (filed_card, 3),
    (weekly_digest, 2),
    (copy_drill, 4),
    (lookup_drill, 3),
]


def make_document(rng: random.Random) -> list[Segment]:
    """One document of a random kind."""
    makers, weights = zip(*MAKERS, strict=True)
    return rng.choices(makers, weights)[0](rng)
