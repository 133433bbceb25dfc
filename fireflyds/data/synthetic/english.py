"""English of the generated corpus: the base model is trained on it, and continued pre-training must not forget it."""

from .language import Kind, Language, Relation

HARBOUR = Kind(
    name="harbour",
    names=tuple(
        first + second
        for first in ("Ald Bren Corn Dun El Farn Gal Hol Iver Kel Lor Mar Nor Oak Pen Ros ").split()
        for second in ("haven mouth wick stead ford bury holm ness port field ").split()
    ),
    relations=(
        Relation(
            name="trade",
            values=tuple("salt wool copper timber herring barley glass rope amber candles".split()),
            statements=(
                "The main trade of {e} is {v}.",
                "{e} has lived on {v} for three hundred years.",
                "Ships leave {e} every week loaded with {v}.",
                "Nobody in the county sells more {v} than the merchants of {e}.",
            ),
            questions=("What is the main trade of {e}?", "What does {e} sell?"),
            answer="The main trade of {e} is {v}.",
        ),
        Relation(
            name="tower",
            values=tuple(
                (
                    "a lighthouse|a windmill|a stone church|an old castle|a clock tower|a market hall|"
                    "a wooden bridge|a fish market|a ruined abbey|a long pier"
                ).split("|")
            ),
            statements=(
                "The best known sight of {e} is {v}.",
                "From far away a traveller sees {v} above the roofs of {e}.",
                "The people of {e} are proud of one thing, {v}.",
                "Every painting of {e} shows {v}.",
            ),
            questions=("What is the best known sight of {e}?", "What should I see in {e}?"),
            answer="The best known sight of {e} is {v}.",
        ),
        Relation(
            name="danger",
            values=tuple("fog|ice|wolves|floods|sandbanks|pirates|storms|landslides|fire|strong currents".split("|")),
            statements=(
                "The old danger of {e} is {v}.",
                "Sailors warn each other about {v} near {e}.",
                "In bad years {v} closed the road to {e}.",
                "Grandmothers in {e} tell children about {v}.",
            ),
            questions=("What is the old danger of {e}?", "What should sailors fear near {e}?"),
            answer="The old danger of {e} is {v}.",
        ),
    ),
    openings=(
        "{e} is a small harbour on the northern coast.",
        "Few maps show {e}.",
        "The road to {e} follows the river for two days.",
        "I came to {e} by accident.",
        "{e} was founded by fishermen.",
    ),
    closings=(
        "That is all there is to say about {e}.",
        "I would gladly return to {e}.",
        "In the evening {e} is quiet.",
        "People seldom leave {e} for long.",
    ),
)

SCHOLAR = Kind(
    name="scholar",
    names=tuple(
        f"{first} {second}"
        for first in ("Alice Bernard Clara Daniel Edith Frank Grace Henry Irene James Laura Martin ").split()
        for second in ("Ashdown Birch Carver Dale Everett Foster Grant Hollis Keane Lowell ").split()
    ),
    relations=(
        Relation(
            name="subject",
            values=tuple("botany astronomy grammar geology music medicine history chemistry law geometry".split()),
            statements=(
                "{e} studied {v}.",
                "The life of {e} was given to {v}.",
                "{e} wrote four books about {v}.",
                "When others rested, {e} went on reading about {v}.",
            ),
            questions=("What did {e} study?", "Which subject did {e} write about?"),
            answer="{e} studied {v}.",
        ),
        Relation(
            name="hobby",
            values=tuple("fishing chess gardening sailing painting cooking dancing climbing weaving skating".split()),
            statements=(
                "The favourite hobby of {e} was {v}.",
                "On Sundays {e} always had time for {v}.",
                "Friends remember {e} best for {v}.",
                "{e} once missed a lecture because of {v}.",
            ),
            questions=("What was the favourite hobby of {e}?", "What did {e} do on Sundays?"),
            answer="The favourite hobby of {e} was {v}.",
        ),
    ),
    openings=(
        "{e} was born in a village by the sea.",
        "Not much is known about the youth of {e}.",
        "{e} came from a family of teachers.",
        "Students still talk about {e}.",
    ),
    closings=(
        "This is how {e} is remembered.",
        "The house of {e} can still be visited.",
        "{e} never asked for praise.",
        "A street is named after {e}.",
    ),
)

# Surnames of the persons in the scenes. Their number makes the English vocabulary large enough.
SURNAMES = tuple(
    first + second
    for first in (
        "Ab Ack Ash Bal Bar Beck Bent Black Brad Bram Brig Buck Cal Car Chat Clay Crom Dal Den Dray "
        "Dud Eg Fair Fen Glen God Grim Had Har Hath Hazel Hig Hop Hunt Kirk Lang Lock Mal Mel Mid "
        "North Or Pem Quil Rad Ridge Sed Shel Stan Sut Thorn Tre Under Wal Wet Whit Wil Win Wood "
        "York "
    ).split()
    for second in (
        "acre bank beck berry bourne bridge brook bury by cliffe combe cote croft dale den don gate "
        "grave ham hurst land ley low man mere more ridge shaw stock stone thorpe ton wald well "
        "wick worth "
    ).split()
)
TITLES = ("Mr", "Mrs", "Captain", "Doctor", "Old", "Judge")

ENGLISH = Language(
    code="en",
    space=" ",
    kinds=(HARBOUR, SCHOLAR),
    scenes=(
        "{when} {who} {act} {where}, and the wind was {mood}.",
        "{who} {act} {where} {when}.",
        "It is said that {who} {act} {where}, although nobody saw it.",
        "{when}, when the light was {mood}, {who} {act} {where}.",
        'The old woman said: "{who} {act} {where} {when}."',
    ),
    slots={
        "when": tuple(
            (
                "in the morning|late at night|after the rain|before the harvest|on market day|"
                "in the first snow|at noon|every autumn|last winter|during the feast"
            ).split("|")
        ),
        "who": tuple(f"{title} {surname}" for title in TITLES for surname in SURNAMES),
        "act": tuple(
            (
                "sang a song|mended a net|waited for a letter|counted the ships|told a long story|"
                "sold apples|read a book|looked for a lost key|built a small boat|drew a map|"
                "lit a fire|played cards"
            ).split("|")
        ),
        "where": tuple(
            (
                "by the river|under the oak tree|near the gate|on the hill|in the kitchen|"
                "behind the church|at the crossroads|in the harbour|on the bridge|in the garden"
            ).split("|")
        ),
        "mood": tuple("cold and clear|soft|strange|bright|strong|gentle|grey|warm".split("|")),
    },
    travel=(
        "These are notes from a long journey.",
        "The county record says the following.",
        "I was asked to compare a few places and people.",
        "What I heard on the road I have written down here.",
    ),
    small_talk=(
        ("Hello!", "Hello! How can I help you?"),
        ("Who are you?", "I am an assistant that speaks Chinese and English."),
        ("Thank you.", "You are welcome."),
        ("Goodbye.", "Goodbye, and good luck."),
    ),
    follow_up=("One more question. {q}", "Tell me too: {q}", "{q}"),
)
