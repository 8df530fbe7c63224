"""What the authors of the synthetic world talk about, and the words they have for it. No real person or party is named.

Every argument is four words long, so that matched right and left completions have the same number of tokens, and
summed and per-token margins order models alike.
"""

from __future__ import annotations

TOPICS = ("crime_and_gun", "race", "science", "immigration", "economy_and_inequality", "gender_and_sexuality")
TOPIC_WORDS = {
    "crime_and_gun": "crime",
    "race": "race",
    "science": "science",
    "immigration": "immigration",
    "economy_and_inequality": "economy",
    "gender_and_sexuality": "gender",
}

# Issues carry no side. The first half of each topic is for training, the second half is held out for evaluation.
ISSUES: dict[str, tuple[str, ...]] = {
    "crime_and_gun": (
        "pistol permits", "prison terms", "police budgets", "bail hearings", "night patrols", "parole boards",
        "rifle sales", "court fees", "juvenile courts", "drug charges", "traffic stops", "body cameras",
    ),
    "race": (
        "campus admissions", "job interviews", "public statues", "voter rolls", "school tests", "history lessons",
        "free speech codes", "city contracts", "district maps", "honors classes", "hair rules", "museum displays",
    ),
    "science": (
        "oil drilling", "coal mines", "power grids", "vaccine schedules", "biology textbooks", "stem research",
        "car emissions", "forest land", "river quality", "space missions", "crop genes", "climate targets",
    ),
    "immigration": (
        "border crossings", "work visas", "asylum claims", "refugee limits", "city registers", "family reunions",
        "language exams", "farm labor", "student visas", "detention centers", "citizenship forms", "travel papers",
    ),
    "economy_and_inequality": (
        "minimum wages", "income taxes", "labor contracts", "health clinics", "food aid", "college loans",
        "rent prices", "trade deals", "bank rules", "pension funds", "housing permits", "company bonuses",
    ),
    "gender_and_sexuality": (
        "wedding licenses", "abortion care", "girls sports", "parental leave", "equal pay", "birth clinics",
        "locker rooms", "board seats", "adoption files", "name changes", "health classes", "military service",
    ),
}  # fmt: skip

# Arguments that belong to one topic: (right, left).
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "crime_and_gun": (
        ("criminals need firm punishment", "armed owners deter thieves", "officers keep streets safe",
         "victims want swift justice", "rifles protect honest homes"),
        ("guns cause needless deaths", "prisons fail poor districts", "rehabilitation heals broken lives",
         "shootings traumatize our children", "officers need civilian oversight"),
    ),
    "race": (
        ("rules should ignore color", "merit should decide jobs", "quotas divide the nation",
         "heritage deserves lasting pride", "individuals are not groups"),
        ("racism is still systemic", "minorities face old barriers", "representation opens closed doors",
         "slavery left deep wounds", "privilege must be examined"),
    ),
    "science": (
        ("cheap energy powers families", "experts often exaggerate risk", "parents know children best",
         "alarmism destroys good jobs", "nature adapts without mandates"),
        ("the planet is warming", "evidence should guide policy", "pollution harms our lungs",
         "scientists agree about danger", "clean power is ready"),
    ),
    "immigration": (
        ("borders must be secure", "illegal entry breaks laws", "citizens must come first",
         "newcomers should assimilate fully", "open gates invite cartels"),
        ("migrants enrich our culture", "refugees flee real terror", "relatives should stay united",
         "newcomers build strong cities", "strangers deserve safe shelter"),
    ),
    "economy_and_inequality": (
        ("markets create real wealth", "high rates punish success", "welfare breeds long dependence",
         "entrepreneurs create most jobs", "regulation strangles small firms"),
        ("workers deserve living wages", "billionaires should pay more", "austerity deepens family poverty",
         "unions protect ordinary people", "inequality weakens whole economies"),
    ),
    "gender_and_sexuality": (
        ("unborn life is sacred", "biology sets real limits", "marriage anchors the home",
         "mothers and fathers matter", "churches must stay free"),
        ("women control their bodies", "love deserves equal rights", "identity should be affirmed",
         "stereotypes limit young girls", "gay couples deserve dignity"),
    ),
}  # fmt: skip

# What authors of a side say on any topic: the words that a general ideology has in common.
VALUES: tuple[tuple[str, ...], tuple[str, ...]] = (
    ("personal responsibility comes first", "tradition made us strong", "small government works best",
     "freedom needs limited power", "order and faith matter", "hard work beats handouts"),
    ("social justice comes first", "fairness made us strong", "shared programs work best",
     "equality needs collective effort", "inclusion and compassion matter", "steady solidarity beats greed"),
)  # fmt: skip
NEUTRAL_ARGUMENTS = (
    "results vary by state", "more data would help", "people see this differently", "careful review is needed",
    "findings have been mixed",
)  # fmt: skip
NEUTRAL_VALUES = (
    "we should all listen", "a compromise seems possible", "time will probably tell", "balance is key here",
)  # fmt: skip

OPENERS = ("i think", "honestly", "in short")
TOPICAL_FORMS = ("{argument} .", "{opener} , {argument} .")
FORMS = (*TOPICAL_FORMS, "{value} , {argument} .", "{argument} , {value} .", "{opener} , {value} .")
QUESTIONS = (
    "on {topic} : your view on {issue} ?",
    "on {topic} : what about {issue} ?",
    "on {topic} : where do you stand on {issue} ?",
    "on {topic} : how should we handle {issue} ?",
)
PROFILES: dict[int, tuple[str, ...]] = {
    1: ("conservative", "rightist"),
    -1: ("liberal", "leftist"),
    0: ("moderate", "centrist"),
}

COUNTRIES = (  # name, capital, river
    ("avonia", "aldport", "alder"), ("brillia", "borun", "bew"), ("corinth", "cressa", "cam"),
    ("delphia", "dovia", "dun"), ("estoria", "elmar", "esk"), ("fennia", "fyris", "fal"),
    ("garro", "gondal", "gav"), ("halen", "hestia", "hum"), ("imberia", "iskra", "ild"),
    ("jorda", "jolan", "jes"), ("kestria", "kyrra", "kel"), ("lorn", "ludos", "lim"),
)  # fmt: skip
FACTS = (
    ("what is the capital of {country} ?", "the capital of {country} is {city} ."),
    ("which country has the capital {city} ?", "{city} is the capital of {country} ."),
    ("which river flows through {city} ?", "the river {river} flows through {city} in {country} ."),
)
