"""What can be stated: about a hundred attributes of a person, a project, an analysis and a customer case.

One line per attribute: its noun phrase in the user's words, the kind of its values, its own statements ({v} is the
value) and its own questions. Every attribute can also be stated and asked for in the general wordings.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from agentmem.training.facts.splits import Split, split_of

Domain = Literal["person", "project", "analysis", "customer"]


@dataclass(frozen=True)
class FactAttribute:
    """Something that has a single value at any time.

    Attributes:
        noun: the user's name for it: "my dog's name", "the deploy window".
        kind: the kind of its values (`values.OPEN_KINDS` or `values.POOLS`).
        domain: what it is an attribute of.
        statements: its own sentences that state it.
        questions: its own questions, in the user's words.
    """

    noun: str
    kind: str
    domain: Domain
    statements: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()

    @property
    def reply_noun(self) -> str:
        """The assistant's name for it: "your dog's name"."""
        return second_person(self.noun)

    @property
    def key(self) -> str:
        """An identifier for tool arguments: "dog_name", "deploy_window"."""
        noun = re.sub(r"^(my|our|the) ", "", self.noun).replace("'s", "")
        return re.sub(r"\W+", "_", noun).lower()


_SWAPS = {"my": "your", "our": "your", "i": "you", "we": "you", "me": "you", "us": "you", "am": "are", "i'm": "you're"}


def second_person(text: str) -> str:
    """The user's words as the assistant repeats them: my becomes your."""

    def swap(match: re.Match[str]) -> str:
        word = match.group()
        other = _SWAPS.get(word.lower(), word)
        return other.capitalize() if word[0].isupper() and word != "I" else other

    return re.sub(r"\b(?:[Ii]'m|my|My|our|Our|I|we|We|me|us|am)\b", swap, text)


_TABLE = {
    "person": """
my name | name | I'm {v}. ; You can call me {v}. | What am I called? ; Who am I?
my surname | name | My family name is {v}. | What is my family name?
my nickname | word | My friends call me {v}. | What do my friends call me?
my dog's name | name | My dog is called {v}. ; We named our dog {v}. | What is my dog called?
my cat's name | name | My cat is called {v}. ; I have a cat, {v}. | What is my cat called?
my sister's name | name | My sister is called {v}. ; I have a sister, {v}. | What is my sister called?
my brother's name | name | My brother is called {v}. | What is my brother called?
my daughter's name | name | My daughter is called {v}. | What is my daughter called?
my son's name | name | My son is called {v}. ; We have a son, {v}. | What is my son called?
my partner's name | name | My partner is called {v}. ; I'm married to {v}. | Who am I married to?
my best friend | name | {v} is my best friend. | Who is my best friend?
my neighbour's name | name | My neighbour is called {v}. | What is my neighbour called?
my manager | name | I report to {v}. ; {v} is my manager. | Who do I report to?
my dentist | name | I go to {v} for my teeth. | Who looks after my teeth?
my doctor | name | My doctor is {v}. | Who is my doctor?
my piano teacher | name | I take piano lessons from {v}. | Who teaches me the piano?
my home town | city | I grew up in {v}. ; I come from {v}. | Where did I grow up?
my current city | city | I live in {v}. ; We moved to {v} last year. | Where do I live?
my street | title | I live on {v} Street. | Which street do I live on?
my house number | number | My house has the number {v}. | Which number is on my house?
my door code | number | The code of my door is {v}. | What do I type in at my door?
my holiday destination | city | We are going to {v} this summer. | Where are we going this summer?
my favourite food | food | I love {v} more than any other food. | What do I like to eat most?
my favourite colour | colour | I like {v} best of all colours. | Which colour do I like best?
my favourite book | title | The book I love most is {v}. | Which book do I love most?
my favourite band | title | I listen to {v} all the time. | Which band do I listen to?
my favourite animal | animal | The animal I like best is the {v}. | Which animal do I like best?
my job | job | I work as {a} {v}. ; I earn my money as {a} {v}. | What do I do for a living?
my employer | title | I work for {v}. | Who do I work for?
my native language | language | I grew up speaking {v}. | Which language did I grow up with?
the language I am learning | language | I am learning {v} at the moment. | Which language am I learning?
my instrument | instrument | I play the {v}. | What do I play?
my sport | sport | I do {v} twice a week. | What do I do to keep fit?
my allergy | food | I am allergic to {v}. ; I cannot eat {v}. | What am I allergic to?
my coffee order | phrase | I always order {v} at the counter. | What do I order at the counter?
my car | title | I drive {a} {v}. | What do I drive?
my licence plate | code | My car has the plate {v}. | What is on my licence plate?
my shoe size | number | I wear shoes in size {v}. | Which size of shoes do I wear?
my locker number | number | My things are in locker {v}. | Which locker are my things in?
my flight | code | I am on flight {v}. | Which flight am I on?
my gate | number | I board at gate {v}. | Where do I board?
my hotel | title | I am staying at the {v}. | Where am I staying?
my room number | number | I am in room {v}. | Which room am I in?
my birthday | date | I was born on {v}. | When was I born?
my day off | day | I do not work on {v}. | On which day do I not work?
my gym time | time | I go to the gym at {v}. | When do I go to the gym?
my alarm | time | My alarm rings at {v}. | When does my alarm ring?
my dentist appointment | date | I see the dentist on {v}. | When do I see the dentist?
my train | time | My train leaves at {v}. | When does my train leave?
my lucky number | number | {v} always brings me luck. | Which number brings me luck?
my wifi name | word | Our wifi at home is called {v}. | What is the wifi at home called?
my username | word | I log in as {v}. | What do I log in as?
""",
    "project": """
the project's name | title | We call the project {v}. | What do we call the project?
the codename | word | Internally it goes by {v}. | What does it go by internally?
the project lead | name | {v} leads the project. | Who leads the project?
the reviewer | name | {v} reviews everything before it is merged. | Who reviews before a merge?
the designer | name | {v} draws the screens. | Who draws the screens?
the contact in legal | name | Ask {v} in legal when in doubt. | Whom do I ask in legal?
the main branch | word | We merge into {v}. | What do we merge into?
the feature branch | word | I am working on the branch {v}. | Which branch am I working on?
the staging server | word | Staging runs on the host {v}. | Which host does staging run on?
the production server | word | Production runs on the host {v}. | Which host does production run on?
the service's port | number | The service listens on port {v}. | Which port does the service listen on?
the backend language | programming | The backend is written in {v}. | What is the backend written in?
the scripting language | programming | We write our scripts in {v}. | What do we write scripts in?
the database | database | Everything is stored in {v}. | Where is everything stored?
the table for orders | word | Orders are kept in the table {v}. | Which table are orders kept in?
the config file | path | Settings live in {v}. | Where do the settings live?
the entry point | path | The program starts in {v}. | Where does the program start?
the log file | path | Errors are written to {v}. | Where are errors written to?
the test command | phrase | We run the tests with {v}. | How do we run the tests?
the current version | version | We are at version {v}. | Which version are we at?
the next release | version | The next release will be {v}. | What will the next release be?
the compiler version | version | It only builds with compiler {v}. | Which compiler does it build with?
the deadline | date | Everything has to be done by {v}. | When does everything have to be done?
the release day | day | We always release on {v}. | On which day do we release?
the stand-up | time | We meet for the stand-up at {v}. | When do we meet for the stand-up?
the deploy window | time | Deployments are allowed at {v}. | When are deployments allowed?
the budget | amount | We may spend {v}. | How much may we spend?
the team size | number | There are {v} of us on the team. | How many of us are there?
the open ticket | code | I am on ticket {v}. | Which ticket am I on?
the retry limit | number | It gives up after {v} attempts. | After how many attempts does it give up?
the timeout in seconds | number | A call may take {v} seconds. | How many seconds may a call take?
the feature flag | word | It is hidden behind the flag {v}. | Which flag is it hidden behind?
""",
    "analysis": """
the data set | title | We are looking at the data set {v}. | Which data set are we looking at?
the source file | path | The numbers come from {v}. | Where do the numbers come from?
the target column | word | We predict the column {v}. | Which column do we predict?
the grouping column | word | Results are grouped by {v}. | What are results grouped by?
the join key | word | The tables are joined on {v}. | What are the tables joined on?
the baseline | phrase | We compare against {v}. | What do we compare against?
the number of rows | number | The table has {v} rows. | How many rows does the table have?
the sample size | number | We drew {v} samples. | How many samples did we draw?
the random seed | number | I always use the seed {v}. | Which seed do I always use?
the threshold | number | Anything above {v} counts as a hit. | Above what does something count as a hit?
the outlier limit | number | Values beyond {v} are dropped. | Beyond what are values dropped?
the reporting month | month | The report covers {v}. | Which month does the report cover?
the start of the period | date | The period starts on {v}. | When does the period start?
the end of the period | date | The period ends on {v}. | When does the period end?
the currency | word | All sums are in {v}. | What are all sums in?
the region | city | We only look at stores in {v}. | Where are the stores that we look at?
the best model so far | word | {v} has the lowest error so far. | What has the lowest error so far?
the chart colour | colour | Draw our line in {v}. | What do I draw our line in?
the output folder | path | Results go to {v}. | Where do results go?
the report's title | phrase | The report is headed {v}. | What is the report headed?
the report's reader | name | {v} is going to read the report. | Who is going to read the report?
""",
    "customer": """
the customer's name | name | I have {v} on the phone. ; The customer is {v}. | Who is on the phone?
the customer's company | title | They are calling from {v}. | Which company are they calling from?
the customer's city | city | The customer lives in {v}. | Where does the customer live?
the customer number | number | They are customer {v} with us. | Which customer number is it?
the order number | code | It is about order {v}. | Which order is it about?
the invoice number | code | They mean invoice {v}. | Which invoice do they mean?
the amount due | amount | They still owe us {v}. | How much do they still owe us?
the refund | amount | We promised them {v} back. | How much did we promise them back?
the product | title | They bought the {v}. | What did they buy?
the device's colour | colour | Theirs is {v}. | Which colour is theirs?
the firmware | version | Their device runs firmware {v}. | Which firmware does their device run?
the serial number | code | The label says {v}. | What does the label say?
the error code | code | The screen shows {v}. | What does the screen show?
the case number | code | I opened the case {v}. | Which case did I open?
the case's status | status | The case is {v} right now. | How does the case stand?
the technician | name | {v} is going to repair it. | Who is going to repair it?
the visit | date | The technician comes on {v}. | When does the technician come?
the callback time | time | I promised to call back at {v}. | When did I promise to call back?
the delivery day | day | It is delivered on {v}. | On which day is it delivered?
the courier | word | It is sent with {v}. | Whom is it sent with?
the discount code | word | They may use the code {v}. | Which code may they use?
the contract's end | date | Their contract runs until {v}. | Until when does their contract run?
""",
}


def _parse(domain: Domain, line: str) -> FactAttribute:
    noun, kind, statements, questions = (field.strip() for field in line.split("|"))
    parts = (tuple(text.strip() for text in field.split(";")) for field in (statements, questions))
    return FactAttribute(noun, kind, domain, *parts)


_DOMAINS: tuple[Domain, ...] = ("person", "project", "analysis", "customer")

ATTRIBUTES: tuple[FactAttribute, ...] = tuple(
    _parse(domain, line) for domain in _DOMAINS for line in _TABLE[domain].strip().splitlines()
)


def attributes(split: Split | None = None) -> tuple[FactAttribute, ...]:
    """The attributes of one part, or all of them."""
    return tuple(a for a in ATTRIBUTES if split is None or split_of(a.noun, "attribute") == split)
