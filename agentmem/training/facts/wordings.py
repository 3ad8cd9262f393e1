"""The wordings of every act, with {noun}, {Noun}, {v} and {old} to fill in.

In the user's messages nouns are in the first person ("my dog's name"), in replies in the second ("your dog's name"). A
hash of its text decides whether a wording belongs to training or is held out (`splits.wordings`).
"""

from __future__ import annotations

import re

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
    "You should know that {noun} is {v}.",
    "Write this down: {noun} is {v}.",
    "As for {noun}, it is {v}.",
    "When it comes to {noun}, think of {v}.",
    "I can tell you that {noun} is {v}.",
    "Here is a detail: {noun} is {v}.",
    "To be precise, {noun} is {v}.",
    "If anybody asks, {noun} is {v}.",
    "It is {v} if you need {noun}.",
    "Take {v} as {noun}.",
    "Speaking of {noun}: it is {v}.",
    "Did I mention that {noun} is {v}?",
    "Let me add that {noun} is {v}.",
    "I forgot to say that {noun} is {v}.",
    "In case it matters, {noun} is {v}.",
    "For {noun} please note {v}.",
    "{Noun}? That is {v}.",
    "The answer for {noun} is {v}.",
    "Store {v} as {noun}, please.",
    "Since you may need it: {noun} is {v}.",
)
"""Statements of one fact. An attribute's own statement may replace any of them."""

OPENINGS = (
    "",
    "",
    "",
    "",
    "",
    "",
    "By the way: ",
    "For your notes: ",
    "Before I forget: ",
    "So you know: ",
    "Hello! ",
    "OK. ",
    "Well. ",
    "Another thing. ",
    "Listen: ",
    "For the record: ",
    "One more thing. ",
    "Good to know: ",
)
"""Put before an attribute's own statement."""

TELL_SEVERAL = (
    "{facts}",
    "A few facts. {facts}",
    "Let me introduce things. {facts}",
    "Some background: {facts}",
    "Several things at once. {facts}",
    "Before we begin: {facts}",
    "Here is what you should know. {facts}",
    "Please note all of this. {facts}",
    "{facts} That is all for now.",
    "{facts} Please keep that in mind.",
    "Let me fill you in. {facts}",
    "I have some details for you. {facts}",
)
"""Several facts in one message, each in its own sentence."""

SYSTEMS = (
    "",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "Be concise.",
    "You help a team with its work.",
    "You are an assistant with a memory.",
    "You are a coding assistant.",
    "Answer in plain English.",
    "You are a personal assistant. Be polite and short.",
    "Help the user with the analysis of data.",
    "You work for customer support.",
)
"""System messages, of which an episode may have one."""

ACKNOWLEDGE = (
    "Got it.",
    "Thank you, noted.",
    "I will remember that.",
    "Understood.",
    "Good to know.",
    "All right, I have that.",
    "I have made a note of it.",
    "Thanks for telling me.",
    "Okay, I will keep that in mind.",
    "Noted.",
    "That is clear.",
    "Thanks, I will come back to it when you need it.",
    "Fine, go on.",
    "I see, thank you.",
    "Noted: {noun} is {v}.",
    "Thanks, {noun} is {v}.",
    "So {noun} is {v}. Noted.",
    "Okay: {noun} is {v}.",
)
"""Replies to statements. The last ones repeat one fact; they are used for messages that state a single fact."""

CHANGE = (
    "{Noun} has changed: it is {v} now.",
    "From today {noun} is {v}.",
    "{Noun} is now {v}.",
    "We changed {noun} to {v}.",
    "Update: {noun} is {v} from now on.",
    "{Noun} is no longer {old}, it is {v}.",
    "Instead of {old}, {noun} is {v} now.",
    "There is news: {noun} is {v} now.",
    "Please update {noun} to {v}.",
    "{Noun} used to be {old}. It is {v} now.",
    "As of this week {noun} is {v}.",
    "A change of plan: {noun} is {v} from here on.",
    "Forget {old}. {Noun} is {v} now.",
    "Things have moved on: {noun} is {v} these days.",
    "{Noun} went from {old} to {v}.",
    "Since this morning {noun} is {v}.",
    "From here on use {v} for {noun}.",
    "{Noun} is different now: {v}.",
    "What I said about {noun} is out of date, it is {v} now.",
    "They have made {noun} {v} now.",
    "Replace {noun} by {v}, please.",
    "New day, new plan: {noun} is {v}.",
    "It was {old} before, but {noun} is {v} by now.",
)

CORRECT = (
    "Sorry, I was wrong: {noun} is {v}.",
    "I made a mistake. {Noun} is {v}, not {old}.",
    "Correction: {noun} is {v}.",
    "No wait, {noun} is actually {v}.",
    "I mixed something up, {noun} is {v}.",
    "My mistake: {noun} is {v} and not {old}.",
    "I misspoke, {noun} is {v}.",
    "Let me correct myself: {noun} is {v}.",
    "That was not right. {Noun} is {v}.",
    "Not {old}: {noun} is {v}.",
    "I have to take that back, {noun} is {v}.",
    "Oh, I told you nonsense. {Noun} is {v}.",
    "I checked again, and {noun} is {v}.",
    "I said {old}, but {noun} is {v}.",
    "Strike {old}. {Noun} is {v}.",
)

ACKNOWLEDGE_CHANGE = (
    "I have updated that.",
    "Thank you, {noun} is {v} now.",
    "Noted, it is {v}.",
    "Understood, changed.",
    "Thanks, I have corrected it.",
    "All right, {v} it is.",
    "Okay, {v} from now on.",
    "Good that you say so. I have changed it.",
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
    "Do you still know {noun}?",
    "Could you remind me of {noun}?",
    "What have I said about {noun}?",
    "{Noun}, please.",
    "{Noun}?",
    "Tell me once more: what is {noun}?",
    "Quick question: what is {noun}?",
    "What do you have for {noun}?",
    "I cannot recall {noun}. Can you?",
    "Say {noun} for me, please.",
    "Look back: what did I give as {noun}?",
    "Just to check, what is {noun}?",
    "Somebody wants to know {noun}. What is it?",
    "I have to write down {noun}. What was it?",
    "Can you repeat {noun}?",
    "Would you happen to know {noun}?",
    "For the form: what is {noun}?",
    "Earlier I talked about {noun}. What was it?",
    "Help me out, what is {noun}?",
    "Let me test you: what is {noun}?",
    "What should I put down for {noun}?",
    "May I hear {noun} again?",
)

ANSWER = ("{Noun} is {v}.",)
"""The reply that recalls a value: a single wording, so that only the value varies between replies."""

ASK_CHOICE = (
    "Is {noun} {a} or {b}?",
    "Which one is {noun}, {a} or {b}?",
    "{Noun}: was it {a} or {b}?",
    "I hesitate between {a} and {b}. Which is {noun}?",
    "What did I say about {noun}, {a} or {b}?",
    "Help me decide: is {noun} {a} or {b}?",
    "Should I write {a} or {b} for {noun}?",
    "One of {a} and {b} is {noun}. Which one?",
    "Did I say {a} or {b} for {noun}?",
    "Either {a} or {b} is {noun}. Which is it?",
    "Do you have {a} or {b} as {noun}?",
    "I remember {a} and {b}. Which of them is {noun}?",
)

NEVER_TOLD = ("{Noun} is not something you have told me.",)
"""The reply to a question about something that was never told; `says_it_was_not_told` recognises it.

It begins as an answer does, so that the two part where a value would stand. There the memory is read for the value: if
nothing was written, nothing speaks against "not". At a reply's first token a memory would have to know whether it holds
something before it looks for it.
"""
NOT_TOLD = "not something"
"""The words of `NEVER_TOLD` that stand in a value's place."""

_NOT_TOLD = re.compile(
    r"(?:\bnever|\bnot|n['’]t)(?: yet| been| ever| actually)* "
    r"(?:told|tell|mention(?:ed)?|said|say|given?|gave|shared?|stated?|specif(?:y|ied)|provided?)\b"
    r"|\bnot (?:something|anything)(?: that)? you(?:['’]ve| have)?(?: ever| yet)? "
    r"(?:told|mentioned|said|gave|given|shared)\b"
    r"|\b(?:do|did) ?(?:not|n['’]t) (?:know|recall|remember)\b"
    r"|\bno (?:record|mention|information|memory|idea)\b|\bdo(?: not|n['’]t) have (?:that|this|any)\b",
    re.IGNORECASE,
)


def says_it_was_not_told(text: str) -> bool:
    """Whether a reply says that something was not told, or that it does not know it."""
    return _NOT_TOLD.search(text) is not None


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
    ("Hi again.", "Hi! Good to hear from you."),
    ("Good evening.", "Good evening! What can I do for you?"),
    ("See you later.", "See you later!"),
    ("Have a nice day.", "Thank you, the same to you!"),
    ("That made me laugh.", "Then it was worth saying."),
    ("I am hungry.", "A small snack may help."),
    ("The traffic was terrible today.", "I am sorry to hear that."),
    ("I did not sleep well.", "I hope that tonight is better."),
    ("It is hot in here.", "Opening a window might help."),
    ("The meeting took forever.", "Meetings do that sometimes."),
    ("I love this song.", "Music makes work easier."),
    ("Guess what, I won a game of chess.", "Congratulations!"),
    ("We have guests tonight.", "I hope that you have a good evening."),
    ("The garden looks lovely in spring.", "Spring is a fine season."),
    ("I should drink more water.", "A glass now would be a start."),
    ("The printer is jammed again.", "Printers like to do that."),
    ("Monday mornings are hard.", "They get better by noon."),
    ("I finally cleaned the kitchen.", "Well done!"),
    ("My back hurts.", "Standing up now and then may help."),
    ("No hurry.", "Thank you, I will take care."),
    ("You can stop now.", "All right."),
    ("Let us go on.", "Gladly."),
    ("Hm.", "Is there anything that I can do?"),
    ("Sounds good.", "I am glad."),
    ("Never mind.", "No problem."),
    ("Wait a second.", "I am waiting."),
    ("The coffee machine works again!", "That is good news."),
    ("I have to go to a meeting.", "Good luck with it."),
    ("It is almost lunchtime.", "Enjoy your meal!"),
    ("Somebody left the door open.", "Perhaps they come right back."),
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
    ("What is the largest animal?", "The blue whale is the largest animal. It can grow to thirty metres."),
    ("How many continents are there?", "There are seven continents. Asia is the largest of them."),
    ("What do caterpillars turn into?", "Caterpillars turn into butterflies. Some turn into moths."),
    ("Which country has the most people?", "India has the most people. China comes second."),
    ("How long does light take from the Sun?", "Light takes about eight minutes from the Sun. It travels very fast."),
    ("What is paper made of?", "Paper is made of wood. Old paper is used again for new paper."),
    ("Which animal is the fastest on land?", "The cheetah is the fastest on land. It tires after a short run."),
    ("How many players does a football team have?", "A football team has eleven players. One of them keeps goal."),
    ("What is the square root of nine?", "The square root of nine is three. That of sixteen is four."),
    ("Which bird cannot fly?", "The ostrich cannot fly. It runs very fast."),
    ("What do you call frozen rain?", "Frozen rain is called hail. Soft frozen rain is snow."),
    ("Where is the Eiffel Tower?", "The Eiffel Tower is in Paris. It was built for a fair."),
    ("How many sides does a hexagon have?", "A hexagon has six sides. An octagon has eight."),
    ("What does a botanist study?", "A botanist studies plants. A zoologist studies animals."),
    ("Which season comes after summer?", "Autumn comes after summer. Winter follows it."),
    ("How many hours does a week have?", "A week has 168 hours. A day has 24."),
    ("What is the hardest natural material?", "Diamond is the hardest natural material. It is made of carbon."),
    ("Which organ pumps the blood?", "The heart pumps the blood. It beats about once a second."),
    ("What is the chemical symbol of gold?", "The symbol of gold is Au. That of silver is Ag."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa. It hangs in Paris."),
    ("What is the plural of mouse?", "The plural of mouse is mice. That of goose is geese."),
    ("Which planet has rings?", "Saturn has rings. They are made of ice and dust."),
)
"""Questions that need no memory, each with a reply of exactly two sentences, so that rules can shorten it."""

EXPLANATIONS = (
    (
        "Tell me about the Moon.",
        "The Moon goes around the Earth. It takes about a month for that. The same side always faces us.",
    ),
    ("Tell me about bees.", "Bees live in large colonies. They collect nectar from flowers. From it they make honey."),
    ("Tell me about rain.", "Water rises from the sea as vapour. It cools and forms clouds. Then it falls as rain."),
    (
        "Explain what a bank does.",
        "A bank keeps money for people. It lends money to others. It earns the difference in interest.",
    ),
    (
        "Explain how bread is baked.",
        "Flour, water and yeast are kneaded. The dough rests and rises. Then it is baked in a hot oven.",
    ),
    (
        "Tell me about the desert.",
        "A desert has very little rain. Days are hot and nights are cold. Few plants grow there.",
    ),
    (
        "Explain what a library is for.",
        "A library lends books. It also has rooms to read in. Many offer courses as well.",
    ),
    ("Tell me about cats.", "Cats are hunters. They sleep most of the day. At night they are awake."),
    (
        "Explain how a bicycle works.",
        "The rider turns the pedals. A chain moves the back wheel. The front wheel steers.",
    ),
    (
        "Tell me about volcanoes.",
        "A volcano is an opening in the crust of the Earth. Hot rock rises through it. It cools and forms a mountain.",
    ),
    (
        "Explain why leaves fall.",
        "Trees save water in winter. They let their leaves fall in autumn. New ones grow in spring.",
    ),
    ("Tell me about the sea.", "The sea covers most of the Earth. Its water is salty. It is home to many animals."),
    (
        "Explain what a compiler does.",
        "A compiler reads a program. It checks it for mistakes. It turns it into instructions for a machine.",
    ),
    ("Tell me about tea.", "Tea is made from leaves. Hot water is poured over them. It is drunk all over the world."),
    (
        "Explain what a map shows.",
        "A map shows a place from above. It has roads and rivers. A scale gives the distances.",
    ),
    ("Tell me about owls.", "Owls hunt at night. They hear very well. Their feathers make no noise."),
    (
        "Explain how glass is made.",
        "Sand is melted with soda and lime. The mass is shaped while it is hot. Then it cools slowly.",
    ),
    ("Tell me about trains.", "Trains run on rails. Most are driven by electricity. They carry people and goods."),
    (
        "Explain what money is for.",
        "Money is used to pay. It measures what things are worth. It can be saved for later.",
    ),
    (
        "Tell me about the brain.",
        "The brain controls the body. It has billions of cells. They talk to each other by signals.",
    ),
)
"""Requests that are usually answered at length, each with a reply of exactly three sentences."""
