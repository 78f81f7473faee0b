"""The seeded world behind the Uma corpus: clients, jobs, freelancers, and who is held out.

Every text of the corpus is rendered from the facts drawn here, so a test can ask whether an answer
carries the facts of its own prompt. Held-out scenes use clients, people and required skill
sets that no training scene of any stage has: the words are known, their combinations are not.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random


def _words(text: str) -> list[str]:
    return text.split()


COMPANY_FIRST = _words(
    "Harbor Cedar Maple Summit River Silver Copper Lantern Willow Falcon Orchard Pioneer "
    "Granite Meadow Coral Amber Juniper Beacon Saffron Aspen"
)
COMPANY_LAST = _words(
    "Bakery Clinic Studio Travel Foods Labs Books Fitness Hotels Coffee Gardens School Media "
    "Cycles Toys Energy"
)
FIRST_NAMES = _words(
    "Maya Daniel Aisha Lucas Priya Tomas Elena Omar Sofia Kenji Grace Mateo Ingrid Samuel Leila "
    "Victor Hana Marcus Nadia Pavel Julia Kofi Clara Diego Amina Oscar Ruth Anton Yara Felix"
)
LAST_NAMES = _words(
    "Torres Chen Okafor Novak Silva Haddad Larsen Patel Moreau Kim Rossi Mensah Weber Costa "
    "Ivanov Brown Tanaka Ali Jensen Reyes Fischer Diaz Cohen Murphy Singh Varga Lopez Berg Sato "
    "Walker"
)
TOOLS = ["Slack", "Jira", "Notion", "Trello", "Git", "Zoom"]
LEVELS = ["entry", "intermediate", "expert"]
DURATIONS = [f"{n} weeks" for n in range(2, 11)] + [f"{n} months" for n in range(2, 10)]


@dataclass(frozen=True)
class Field:
    """One line of work: what people in it are called, know, build and ask about."""

    name: str
    role: str
    skills: list[str]
    projects: list[str]
    past: list[str]
    gains: list[str]
    question: str


FIELDS = [
    Field(
        "web development",
        "web developer",
        ["React", "Vue", "TypeScript", "Node", "Django", "PostgreSQL", "CSS", "GraphQL"],
        ["booking site", "customer portal", "online shop", "member area"],
        ["rebuilt a ticket shop", "built a clinic portal", "moved a store to a new site"],
        ["orders grew", "loading time fell"],
        "do you already have the page designs?",
    ),
    Field(
        "mobile development",
        "mobile developer",
        ["Swift", "Kotlin", "Flutter", "Firebase", "SQLite", "Bluetooth", "Maps", "Payments"],
        ["delivery app", "fitness app", "loyalty app", "travel app"],
        ["shipped a taxi app", "built a recipe app", "rewrote a banking app"],
        ["crashes fell", "daily users grew"],
        "which phones do your customers use most?",
    ),
    Field(
        "data analysis",
        "data analyst",
        ["Python", "SQL", "Pandas", "Tableau", "Excel", "Statistics", "Spark", "Looker"],
        ["sales dashboard", "churn report", "pricing study", "survey report"],
        ["built a stock report", "cleaned ten years of sales data", "set up a weekly dashboard"],
        ["reporting time fell", "forecast errors fell"],
        "where does the data live today?",
    ),
    Field(
        "graphic design",
        "graphic designer",
        [
            "Illustrator",
            "Photoshop",
            "Figma",
            "Branding",
            "Typography",
            "Packaging",
            "InDesign",
            "Sketching",
        ],
        ["logo refresh", "menu design", "brand guide", "product label"],
        ["redrew a coffee brand", "designed a festival poster set", "made a museum guide"],
        ["shelf sales grew", "sign-ups grew"],
        "are there brand colors I should keep?",
    ),
    Field(
        "copywriting",
        "copywriter",
        [
            "Storytelling",
            "SEO",
            "Editing",
            "Interviews",
            "Research",
            "Blogging",
            "Headlines",
            "Newsletters",
        ],
        ["blog series", "product page", "welcome email", "case study"],
        ["wrote a travel blog", "rewrote a bank website", "ran a monthly newsletter"],
        ["search visits grew", "open rates grew"],
        "who is the reader you most want to reach?",
    ),
    Field(
        "translation",
        "translator",
        [
            "Spanish",
            "German",
            "French",
            "Portuguese",
            "Subtitling",
            "Localization",
            "Proofreading",
            "Glossaries",
        ],
        ["user manual", "help center", "training course", "recipe book"],
        ["translated a camera manual", "localized a puzzle game", "subtitled a film series"],
        ["support calls fell", "review scores grew"],
        "do you have a glossary from earlier work?",
    ),
    Field(
        "video editing",
        "video editor",
        [
            "Premiere",
            "Resolve",
            "Animation",
            "Captions",
            "Lighting",
            "Storyboards",
            "Audio",
            "Thumbnails",
        ],
        ["product video", "course trailer", "podcast clip", "event film"],
        ["cut a cooking channel", "edited a charity film", "produced a set of short ads"],
        ["watch time grew", "editing time fell"],
        "how much footage is there already?",
    ),
    Field(
        "digital marketing",
        "marketing specialist",
        [
            "Analytics",
            "AdWords",
            "Surveys",
            "Retargeting",
            "Instagram",
            "LinkedIn",
            "HubSpot",
            "Mailchimp",
        ],
        ["spring campaign", "launch campaign", "referral program", "email campaign"],
        ["ran ads for a gym", "launched a toy brand", "grew a local food club"],
        ["ad costs fell", "new leads grew"],
        "which channel brings you most customers today?",
    ),
    Field(
        "bookkeeping",
        "bookkeeper",
        [
            "QuickBooks",
            "Xero",
            "Payroll",
            "Invoicing",
            "Forecasting",
            "Taxes",
            "Audits",
            "Budgeting",
        ],
        ["yearly closing", "invoice cleanup", "payroll setup", "tax filing"],
        ["closed the books for a hotel", "moved a shop to online books", "set up a payroll"],
        ["late invoices fell", "closing time fell"],
        "which month should the work start with?",
    ),
    Field(
        "cloud operations",
        "cloud engineer",
        ["Docker", "Kubernetes", "Terraform", "Linux", "AWS", "Ansible", "Grafana", "Bash"],
        ["server move", "backup plan", "build pipeline", "monitoring setup"],
        ["moved a news site to the cloud", "automated a test lab", "ran servers for a game"],
        ["hosting costs fell", "outages fell"],
        "how many servers are running today?",
    ),
]

# What the post says (several ways) -> the short name the analysis gives it.
NEEDS = {
    "daily updates": ["We expect a short update every day.", "Please write to us daily."],
    "weekly call": ["There is a call every week.", "We meet on video once a week."],
    "European hours": [
        "Some overlap with Europe is needed.",
        "Please be online in the European day.",
    ],
    "signed NDA": ["You will sign an NDA first.", "An NDA comes before any files."],
    "paid test": ["We start with a small paid test.", "A short paid trial comes first."],
    "fluent English": ["Fluent English is a must.", "All talk is in English, so speak it well."],
    "start on Monday": ["We want to start on Monday.", "Work begins on Monday."],
    "references": ["Please send two references.", "We will ask past clients about you."],
}


@dataclass(frozen=True)
class Job:
    """The facts of one job post."""

    client: str
    field: Field
    project: str
    skills: list[str]
    nice: list[str]
    level: str
    budget: str
    hourly: bool
    duration: str
    needs: list[str]

    @property
    def title(self) -> str:
        """The headline of the post."""
        return f"{self.field.role.capitalize()} for {article(self.project)}"

    @property
    def budget_label(self) -> str:
        """The budget with its kind, as the analysis writes it."""
        return f"{self.budget} {'per hour' if self.hourly else 'fixed'}"


@dataclass(frozen=True)
class Profile:
    """The facts of one freelancer profile; what is None is not in the text."""

    name: str
    field: Field
    skills: list[str]
    years: int
    past: str
    gain: str | None
    rate: str | None
    hours: int | None
    portfolio: bool
    certificate: bool

    @property
    def first(self) -> str:
        """The first name, used in conversation."""
        return self.name.split()[0]


def article(noun: str) -> str:
    """The noun with a or an before it."""
    return f"{'an' if noun[0] in 'aeio' else 'a'} {noun}"


def listing(words: list[str]) -> str:
    """Words joined as English does: 'A, B and C'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def is_held_out(key: str) -> bool:
    """Whether a combination belongs to the held-out fifth; the same on every machine."""
    return zlib.crc32(key.encode()) % 5 == 0


def _pair(rng: random.Random, first: list[str], last: list[str], held: bool) -> str:
    while True:
        name = f"{rng.choice(first)} {rng.choice(last)}"
        if is_held_out(name) == held:
            return name


def _skills(rng: random.Random, field: Field, held: bool) -> list[str]:
    while True:
        skills = rng.sample(field.skills, rng.choice([2, 3, 3, 4]))
        if is_held_out(",".join(sorted(skills))) == held:
            return skills


def make_job(rng: random.Random, held: bool = False, field: Field | None = None) -> Job:
    """Draw one job from the training or the held-out side of the world."""
    field = field or rng.choice(FIELDS)
    hourly = rng.random() < 0.4
    amount = rng.randrange(15, 95) if hourly else rng.randrange(3, 60) * 100
    return Job(
        client=_pair(rng, COMPANY_FIRST, COMPANY_LAST, held),
        field=field,
        project=rng.choice(field.projects),
        skills=_skills(rng, field, held),
        nice=rng.sample(TOOLS, rng.choice([0, 1, 1, 2])),
        level=rng.choice(LEVELS),
        budget=f"${amount:,}",
        hourly=hourly,
        duration=rng.choice(DURATIONS),
        needs=rng.sample(list(NEEDS), rng.choice([1, 1, 2])),
    )


def make_profile(rng: random.Random, held: bool = False, job: Job | None = None) -> Profile:
    """Draw one freelancer; given a job, one of its field who knows most of what it asks."""
    field = job.field if job else rng.choice(FIELDS)
    known = list(job.skills) if job else []
    if len(known) > 2 and rng.random() < 0.5:
        known.remove(rng.choice(known))
    others = [s for s in field.skills if s not in known and not (job and s in job.skills)]
    wanted = rng.choice([2, 3, 4, 5]) if job is None else max(3, len(known) + rng.choice([0, 1]))
    skills = known + rng.sample(others, max(0, min(wanted - len(known), len(others))))
    rng.shuffle(skills)
    gain = f"{rng.choice(field.gains)} by {rng.randrange(11, 60)}%"
    return Profile(
        name=_pair(rng, FIRST_NAMES, LAST_NAMES, held),
        field=field,
        skills=skills,
        years=rng.randrange(1, 16) if job is None else rng.randrange(3, 16),
        past=rng.choice(field.past),
        gain=gain if rng.random() < 0.6 else None,
        rate=f"${rng.randrange(15, 95)}" if rng.random() < (0.6 if job is None else 0.85) else None,
        hours=rng.randrange(10, 41) if rng.random() < 0.6 else None,
        portfolio=rng.random() < 0.6,
        certificate=rng.random() < 0.4,
    )
