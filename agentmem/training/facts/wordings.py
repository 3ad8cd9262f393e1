"""The wordings of every act, with {noun}, {Noun}, {v} and {old} to fill in.

In the user's messages nouns are in the first person ("my dog's name"), in replies in the second ("your dog's name"). A
hash of its text decides whether a wording belongs to training or is held out (`splits.wordings`).
"""

from __future__ import annotations

TELL = (
    "{Noun} is {v}.",
    "{Noun}: {v}.",
    "Just so you know, {noun} is {v}.",
    "Please remember that {noun} is {v}.",
    "By the way, {noun} is {v}.",
    "{v} is {noun}.",
    "For later: {noun} is {v}.",
    "I should mention that {noun} is {v}.",
    "Keep in mind that {noun} is {v}.",
    "Something you will need: {noun} is {v}.",
    "Note that {noun} is {v}.",
    "One thing about us: {noun} is {v}.",
)
"""Statements of one fact. An attribute's own statement may replace any of them."""

OPENINGS = ("", "", "", "", "By the way: ", "For your notes: ", "Before I forget: ", "So you know: ", "Hello! ", "OK. ")
"""Put before an attribute's own statement."""

TELL_SEVERAL = ("{facts}", "A few facts. {facts}", "Let me introduce things. {facts}", "Some background: {facts}")
"""Several facts in one message, each in its own sentence."""

ACKNOWLEDGE = (
    "Got it.",
    "Thank you, noted.",
    "I will remember that.",
    "Understood.",
    "Good to know.",
    "All right, I have that.",
    "Noted: {noun} is {v}.",
    "Thanks, {noun} is {v}.",
)
"""Replies to statements. The last two repeat one fact; they are used for messages that state a single fact."""

CHANGE = (
    "{Noun} has changed: it is {v} now.",
    "From today {noun} is {v}.",
    "{Noun} is now {v}.",
    "We changed {noun} to {v}.",
    "Update: {noun} is {v} from now on.",
    "{Noun} is no longer {old}, it is {v}.",
    "Instead of {old}, {noun} is {v} now.",
)

CORRECT = (
    "Sorry, I was wrong: {noun} is {v}.",
    "I made a mistake. {Noun} is {v}, not {old}.",
    "Correction: {noun} is {v}.",
    "No wait, {noun} is actually {v}.",
    "I mixed something up, {noun} is {v}.",
)

ACKNOWLEDGE_CHANGE = (
    "I have updated that.",
    "Thank you, {noun} is {v} now.",
    "Noted, it is {v}.",
    "Understood, changed.",
)

ASK = (
    "What is {noun}?",
    "Can you tell me {noun}?",
    "Do you remember {noun}?",
    "Remind me, what is {noun}?",
    "What did I say {noun} is?",
    "I forgot {noun}. What is it?",
    "Please tell me {noun}.",
    "What was {noun} again?",
    "Which value did I give for {noun}?",
    "I need {noun} now.",
)

ANSWER = ("{Noun} is {v}.",)
"""The reply that recalls a value: a single wording, so that only the value varies between replies."""

ASK_CHOICE = (
    "Is {noun} {a} or {b}?",
    "Which one is {noun}, {a} or {b}?",
    "{Noun}: was it {a} or {b}?",
    "I hesitate between {a} and {b}. Which is {noun}?",
)

NEVER_TOLD = ("You have not told me {noun}.",)

SMALL_TALK = (
    ("Good morning!", "Good morning! How can I help you?"),
    ("Hello there.", "Hello! What can I do for you?"),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("Thanks a lot.", "You are welcome."),
    ("That was helpful.", "I am glad that it helped."),
    ("It is raining again.", "Then it is a good day to stay inside."),
    ("I had a long day.", "I hope that you can rest now."),
    ("Let me think for a moment.", "Take your time."),
    ("I will be back in five minutes.", "I will be here."),
    ("Where were we?", "We can go on whenever you like."),
    ("I need a break.", "A short walk often helps."),
    ("This coffee is cold.", "A fresh cup will be better."),
    ("My computer is slow today.", "Closing programs that you do not need may help."),
    ("What a week!", "It is almost over."),
    ("Nice weather today.", "Yes, enjoy it!"),
    ("I am a bit tired.", "Perhaps an early night would do you good."),
    ("Sorry for the noise.", "No problem at all."),
    ("Okay.", "Tell me when you need anything."),
    ("One second, the phone rings.", "Of course."),
    ("You are quick.", "Thank you!"),
)
"""Messages that state nothing, and their replies."""

QUESTIONS = (
    ("What is the capital of France?", "The capital of France is Paris. It lies on the Seine."),
    ("How many minutes does an hour have?", "An hour has sixty minutes. A day has 1440."),
    ("Which planet is the largest?", "Jupiter is the largest planet. Saturn comes second."),
    ("What do bees make?", "Bees make honey. They also make wax."),
    ("How many legs does a spider have?", "A spider has eight legs. An insect has six."),
    ("What is the opposite of hot?", "The opposite of hot is cold. Between them lies warm."),
    ("Which ocean is the largest?", "The Pacific is the largest ocean. It covers a third of the Earth."),
    ("What freezes at zero degrees?", "Water freezes at zero degrees Celsius. Salt water needs it colder."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet. He wrote it around 1600."),
    ("What is seven times eight?", "Seven times eight is fifty-six. Eight times eight is sixty-four."),
    ("Which gas do plants take in?", "Plants take in carbon dioxide. They give off oxygen."),
    ("How many days does a leap year have?", "A leap year has 366 days. The additional day is in February."),
    ("What is a baby cat called?", "A baby cat is called a kitten. A baby dog is called a puppy."),
    ("Where do penguins live?", "Penguins live in the southern half of the world. Many live in Antarctica."),
    ("What is bread made of?", "Bread is made of flour and water. Most breads contain yeast and salt."),
    ("Which metal is liquid at room temperature?", "Mercury is liquid at room temperature. It is poisonous."),
    ("What does a thermometer measure?", "A thermometer measures temperature. A barometer measures pressure."),
    ("How many strings does a violin have?", "A violin has four strings. They are tuned in fifths."),
    ("What is the longest river in Africa?", "The Nile is the longest river in Africa. It flows north."),
    ("Which colour do red and yellow make?", "Red and yellow make orange. Blue and yellow make green."),
    ("Why is the sky blue?", "The air scatters blue light more than red. At sunset the path is longer."),
    ("What is a synonym of quick?", "A synonym of quick is fast. Another one is rapid."),
    ("When did people first walk on the Moon?", "People first walked on the Moon in 1969. Two of them did."),
    ("What is the boiling point of water?", "Water boils at 100 degrees Celsius. High up it boils earlier."),
)
"""Questions that need no memory, each with a reply of exactly two sentences, so that rules can shorten it."""
