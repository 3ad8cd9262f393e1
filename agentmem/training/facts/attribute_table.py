"""The table behind `attributes`: for each attribute its noun and the kind of its values, its own statements ({v} is the
value, {a} its article), and its own questions; each of the three on a line of its own.

Several statements and questions per attribute, so that a hash can hold some of them out of training.
"""

from __future__ import annotations

TABLE = {
    "person": """
my name | name
I'm {v}. ; You can call me {v}. ; People know me as {v}. ; Hi, {v} here.
What am I called? ; Who am I? ; By what name do you know me? ; How should you address me?
my surname | name
My family name is {v}. ; I sign with {v}, my last name. ; Our family is called {v}.
What is my family name? ; What is my last name? ; Which surname do I have?
my nickname | word
My friends call me {v}. ; Among friends I go by {v}. ; At school they called me {v}, and it stuck.
What do my friends call me? ; What do I go by among friends? ; Which nickname do I have?
my dog's name | name
My dog is called {v}. ; We named our dog {v}. ; I have a dog, {v}. ; {v} is the best dog I ever had.
What is my dog called? ; What did we name our dog? ; Which name does my dog have?
my cat's name | name
My cat is called {v}. ; I have a cat, {v}. ; Our cat listens to {v}, sometimes.
What is my cat called? ; Which name does my cat listen to? ; How do I call my cat?
my horse's name | name
My horse is called {v}. ; I ride a horse called {v}. ; {v} is the horse I ride.
What is my horse called? ; Which horse do I ride? ; Which name does my horse have?
my sister's name | name
My sister is called {v}. ; I have a sister, {v}. ; {v} is my sister.
What is my sister called? ; Who is my sister? ; Which name did my sister get?
my brother's name | name
My brother is called {v}. ; I have a brother, {v}. ; {v} is my brother.
What is my brother called? ; Who is my brother? ; Which name did my brother get?
my daughter's name | name
My daughter is called {v}. ; We have a daughter, {v}. ; We named our daughter {v}.
What is my daughter called? ; Who is my daughter? ; What did we name our daughter?
my son's name | name
My son is called {v}. ; We have a son, {v}. ; We named our son {v}.
What is my son called? ; Who is my son? ; What did we name our son?
my partner's name | name
My partner is called {v}. ; I'm married to {v}. ; {v} and I live together.
Who am I married to? ; Who do I live with? ; What is my partner called?
my best friend | name
{v} is my best friend. ; I have known {v} since school, we are best friends. ; No friend is closer to me than {v}.
Who is my best friend? ; Which friend is closest to me? ; Who is the friend I trust most?
my neighbour's name | name
My neighbour is called {v}. ; Next door lives {v}. ; {v} lives in the flat beside mine.
What is my neighbour called? ; Who lives next door? ; Who lives in the flat beside mine?
my manager | name
I report to {v}. ; {v} is my manager. ; My boss is {v}.
Who do I report to? ; Who is my boss? ; Who manages me?
my dentist | name
I go to {v} for my teeth. ; {v} looks after my teeth. ; For twenty years my dentist has been {v}.
Who looks after my teeth? ; Which dentist do I go to? ; Who fills my teeth?
my doctor | name
My doctor is {v}. ; When I am ill I go to {v}. ; {v} has treated me for years.
Who is my doctor? ; Who do I go to when I am ill? ; Who has treated me for years?
my piano teacher | name
I take piano lessons from {v}. ; {v} teaches me the piano. ; On the piano I learn from {v}.
Who teaches me the piano? ; Who do I take piano lessons from? ; From whom do I learn the piano?
my hairdresser | name
I get my hair cut by {v}. ; {v} cuts my hair. ; For my hair I go to {v}.
Who cuts my hair? ; Who do I go to for my hair? ; Which hairdresser do I have?
my home town | city
I grew up in {v}. ; I come from {v}. ; I spent my childhood in {v}.
Where did I grow up? ; Where do I come from? ; Where did I spend my childhood?
my current city | city
I live in {v}. ; We moved to {v} last year. ; These days I am at home in {v}.
Where do I live? ; Where did we move last year? ; Which city am I at home in these days?
my street | title
I live on {v} Street. ; My house is on {v} Street. ; You find us on {v} Street.
Which street do I live on? ; Which street is my house on? ; On what street do you find us?
my house number | number
My house has the number {v}. ; We live at number {v}. ; On our door it says {v}.
Which number is on my house? ; At which number do we live? ; What does it say on our door?
my door code | number
The code of my door is {v}. ; To get into my house you type {v}. ; My door opens with {v}.
What do I type in at my door? ; With which code does my door open? ; Which digits open my door?
my floor | number
I live on floor {v}. ; My flat is on floor {v}. ; For my flat take the lift to {v}.
Which floor do I live on? ; Which floor is my flat on? ; To which floor do I take the lift?
my holiday destination | city
We are going to {v} this summer. ; This summer we fly to {v}. ; I have booked a holiday in {v}.
Where are we going this summer? ; Where do we fly this summer? ; Where have I booked a holiday?
my favourite food | food
I love {v} more than any other food. ; I could eat {v} every day. ; Nothing tastes better to me than {v}.
What do I like to eat most? ; What could I eat every day? ; Which dish tastes best to me?
my favourite colour | colour
I like {v} best of all colours. ; I paint everything {v} if I can. ; No colour suits me like {v}.
Which colour do I like best? ; What colour do I paint everything? ; Which colour suits me?
my favourite book | title
The book I love most is {v}. ; I have read {v} five times. ; I never tire of reading {v}.
Which book do I love most? ; Which book have I read five times? ; What do I never tire of reading?
my favourite film | title
The film I love most is {v}. ; I have watched {v} a dozen times. ; I cry every time I watch {v}.
Which film do I love most? ; What have I watched a dozen times? ; Which film makes me cry?
my favourite band | title
I listen to {v} all the time. ; I never miss a concert of {v}. ; {v} is the band I like most.
Which band do I listen to? ; Whose concerts do I never miss? ; Which band do I like most?
my favourite animal | animal
The animal I like best is the {v}. ; At the zoo I go to see the {v} first. ; I could watch {a} {v} for hours.
Which animal do I like best? ; Which animal do I go to see first at the zoo? ; What animal could I watch for hours?
my job | job
I work as {a} {v}. ; I earn my money as {a} {v}. ; By trade I am {a} {v}.
What do I do for a living? ; As what do I work? ; What am I by trade?
my employer | title
I work for {v}. ; I am employed by {v}. ; My salary comes from {v}.
Who do I work for? ; Who am I employed by? ; Who pays my salary?
my native language | language
I grew up speaking {v}. ; At home we always spoke {v}. ; I dream in {v}, my mother tongue.
Which language did I grow up with? ; What did we always speak at home? ; In which language do I dream?
the language I am learning | language
I am learning {v} at the moment. ; I take evening classes in {v}. ; I practise {v} every day.
Which language am I learning? ; In what do I take evening classes? ; Which language do I practise every day?
my instrument | instrument
I play the {v}. ; I practise the {v} every evening. ; In the orchestra I play the {v}.
What do I play? ; What do I practise every evening? ; What do I play in the orchestra?
my sport | sport
I do {v} twice a week. ; I keep fit with {v}. ; On Sundays I do {v}.
What do I do to keep fit? ; Which sport do I do twice a week? ; Which sport do I do on Sundays?
my allergy | food
I am allergic to {v}. ; I cannot eat {v}. ; I get a rash from {v}.
What am I allergic to? ; What can I not eat? ; What gives me a rash?
my coffee order | phrase
I always order {v} at the counter. ; At the cafe they know that I want {v}. ; With my coffee I take {v}.
What do I order at the counter? ; What do they know that I want at the cafe? ; What do I take with my coffee?
my car | title
I drive {a} {v}. ; I bought {a} {v} last spring. ; In my garage stands {a} {v}.
What do I drive? ; Which car did I buy last spring? ; What stands in my garage?
my boat | title
I own a boat, the {v}. ; I sail the {v}. ; My boat is called the {v}.
What is my boat called? ; Which boat do I sail? ; Which boat do I own?
my licence plate | code
My car has the plate {v}. ; The plate on my car says {v}. ; My car is registered as {v}.
What is on my licence plate? ; Which plate does my car have? ; As what is my car registered?
my shoe size | number
I wear shoes in size {v}. ; My shoes are size {v}. ; For shoes I need size {v}.
Which size of shoes do I wear? ; Which size are my shoes? ; What size do I need for shoes?
my weight | number
I weigh {v} kilos. ; The scales say {v} for me. ; I am down to {v} kilos now.
How much do I weigh? ; What do the scales say for me? ; How many kilos am I down to?
my locker number | number
My things are in locker {v}. ; At the pool I have locker {v}. ; I rented locker {v}.
Which locker are my things in? ; Which locker do I have at the pool? ; Which locker did I rent?
my badge number | number
My badge says {v}. ; I was given badge {v}. ; At the gate I show badge {v}.
What does my badge say? ; Which badge was I given? ; Which badge do I show at the gate?
my desk | number
I sit at desk {v}. ; They gave me desk {v}. ; You find me at desk {v}.
Which desk do I sit at? ; Which desk did they give me? ; At which desk do you find me?
my parking space | number
I park in space {v}. ; My car stands in space {v}. ; I rented parking space {v}.
In which space do I park? ; Where does my car stand? ; Which parking space did I rent?
my bus | number
I take bus {v} to work. ; My bus has the number {v}. ; At the stop I wait for the {v}.
Which bus do I take to work? ; Which number does my bus have? ; Which bus do I wait for at the stop?
my flight | code
I am on flight {v}. ; I booked flight {v}. ; I fly with {v} tomorrow.
Which flight am I on? ; Which flight did I book? ; With which flight do I fly tomorrow?
my gate | number
I board at gate {v}. ; My plane leaves from gate {v}. ; I have to be at gate {v}.
Where do I board? ; Which gate does my plane leave from? ; At which gate do I have to be?
my seat | code
I sit in seat {v}. ; On the plane I have seat {v}. ; They moved me to seat {v}.
Which seat do I sit in? ; Which seat do I have on the plane? ; To which seat did they move me?
my hotel | title
I am staying at the {v}. ; I booked a bed at the {v}. ; You can reach me at the {v}.
Where am I staying? ; Where did I book a bed? ; At which hotel can you reach me?
my room number | number
I am in room {v}. ; At the hotel they gave me room {v}. ; My key is for room {v}.
Which room am I in? ; Which room did they give me at the hotel? ; Which room is my key for?
my birthday | date
I was born on {v}. ; I celebrate my birthday on {v}. ; I turn a year older on {v}.
When was I born? ; When do I celebrate my birthday? ; When do I turn a year older?
our wedding day | date
We got married on {v}. ; Our wedding was on {v}. ; We celebrate our wedding on {v}.
When did we get married? ; When was our wedding? ; On which date do we celebrate our wedding?
my day off | day
I do not work on {v}. ; I am free on {v}. ; Never call me on {v}, I am off.
On which day do I not work? ; When am I free? ; When should you never call me?
my gym time | time
I go to the gym at {v}. ; My training starts at {v}. ; I lift weights at {v}.
When do I go to the gym? ; When does my training start? ; When do I lift weights?
my alarm | time
My alarm rings at {v}. ; I get up at {v}. ; I am woken at {v}.
When does my alarm ring? ; When do I get up? ; When am I woken?
my dentist appointment | date
I see the dentist on {v}. ; They check my teeth on {v}. ; The dentist expects me on {v}.
When do I see the dentist? ; When do they check my teeth? ; When does the dentist expect me?
my train | time
My train leaves at {v}. ; I catch the train at {v}. ; I have to be on the platform at {v}.
When does my train leave? ; When do I catch the train? ; When do I have to be on the platform?
my lucky number | number
{v} always brings me luck. ; I always bet on {v}. ; In every lottery I tick {v}.
Which number brings me luck? ; Which number do I always bet on? ; What do I tick in every lottery?
my wifi name | word
Our wifi at home is called {v}. ; At home you join the wifi {v}. ; Our router sends as {v}.
What is the wifi at home called? ; Which wifi do you join at home? ; As what does our router send?
my username | word
I log in as {v}. ; My account goes by {v}. ; On the forum I write as {v}.
What do I log in as? ; What does my account go by? ; As what do I write on the forum?
my hobby | phrase
In my free time I do {v}. ; I spend my weekends on {v}. ; For fun I do {v}.
What do I do in my free time? ; What do I spend my weekends on? ; What do I do for fun?
""",
    "project": """
the project's name | title
We call the project {v}. ; The project runs under the name {v}. ; Everybody knows the project as {v}.
What do we call the project? ; Under which name does the project run? ; As what does everybody know the project?
the codename | word
Internally it goes by {v}. ; Our codename for it is {v}. ; In the hallway we just say {v}.
What does it go by internally? ; Which codename do we have for it? ; What do we just say in the hallway?
the project lead | name
{v} leads the project. ; The project is run by {v}. ; In the end {v} decides about the project.
Who leads the project? ; Who runs the project? ; Who decides about the project in the end?
the reviewer | name
{v} reviews everything before it is merged. ; My changes are reviewed by {v}. ; Nothing gets merged without {v}.
Who reviews before a merge? ; Who reviews my changes? ; Without whom does nothing get merged?
the designer | name
{v} draws the screens. ; The screens are drawn by {v}. ; For icons we ask {v}.
Who draws the screens? ; Whom do we ask for icons? ; By whom are the screens drawn?
the contact in legal | name
Ask {v} in legal when in doubt. ; Contracts go to {v} in legal. ; In legal we talk to {v}.
Whom do I ask in legal? ; Who in legal gets the contracts? ; Whom do we talk to in legal?
the client | title
We build it for {v}. ; The bill goes to {v}. ; {v} ordered the work.
Who do we build it for? ; Who gets the bill? ; Who ordered the work?
the main branch | word
We merge into {v}. ; Releases are cut from the branch {v}. ; Finished work lands on {v}.
What do we merge into? ; Which branch are releases cut from? ; Where does finished work land?
the feature branch | word
I am working on the branch {v}. ; My changes are on the branch {v}. ; I pushed my work to {v}.
Which branch am I working on? ; Which branch are my changes on? ; Where did I push my work?
the staging server | word
Staging runs on the host {v}. ; Before a release we test on {v}. ; For staging we log in to {v}.
Which host does staging run on? ; Where do we test before a release? ; For staging, what do we log in to?
the production server | word
Production runs on the host {v}. ; Customers are served by {v}. ; The live system is on {v}.
Which host does production run on? ; Which host serves customers? ; Where is the live system?
the service's port | number
The service listens on port {v}. ; You reach the service on port {v}. ; We opened port {v} for the service.
Which port does the service listen on? ; On which port do you reach the service? ; Which port did we open?
the backend language | programming
The backend is written in {v}. ; On the server we use {v}. ; All services are coded in {v}.
What is the backend written in? ; What do we use on the server? ; What are all services coded in?
the scripting language | programming
We write our scripts in {v}. ; Small tools are done in {v}. ; For quick scripts we take {v}.
What do we write scripts in? ; In what are small tools done? ; What do we take for quick scripts?
the database | database
Everything is stored in {v}. ; We keep our data in {v}. ; All queries go to {v}.
Where is everything stored? ; What do we keep our data in? ; Where do all queries go?
the table for orders | word
Orders are kept in the table {v}. ; Each order is a row of {v}. ; For orders you query {v}.
Which table are orders kept in? ; Of which table is each order a row? ; What do you query for orders?
the config file | path
Settings live in {v}. ; To change a setting, edit {v}. ; It reads its settings from {v}.
Where do the settings live? ; What do I edit to change a setting? ; From where does it read its settings?
the entry point | path
The program starts in {v}. ; Execution begins in {v}. ; The main function is in {v}.
Where does the program start? ; Where does execution begin? ; Where is the main function?
the log file | path
Errors are written to {v}. ; It logs to {v}. ; When it fails, look into {v}.
Where are errors written to? ; Where does it log to? ; What do I look into when it fails?
the test command | phrase
We run the tests with {v}. ; To test you type {v}. ; The tests start with {v}.
How do we run the tests? ; What do you type to test? ; With which command do the tests start?
the current version | version
We are at version {v}. ; Users have version {v} today. ; The last thing we shipped was {v}.
Which version are we at? ; Which version do users have today? ; What was the last version we shipped?
the next release | version
The next release will be {v}. ; After this one comes {v}. ; We are about to tag {v}.
What will the next release be? ; Which version comes after this one? ; What are we about to tag?
the compiler version | version
It only builds with compiler {v}. ; The compiler we use is at {v}. ; We pinned the compiler to {v}.
Which compiler does it build with? ; At which version is the compiler we use? ; To what did we pin the compiler?
the deadline | date
Everything has to be done by {v}. ; We must finish by {v}. ; They expect it by {v} at the latest.
When does everything have to be done? ; By when must we finish? ; When do they expect it at the latest?
the kick-off | date
We started on {v}. ; The kick-off was on {v}. ; Work began on {v}.
When did we start? ; On which date was the kick-off? ; When did work begin?
the release day | day
We always release on {v}. ; Releases go out on {v}. ; The day for releases is {v}.
On which day do we release? ; When do releases go out? ; Which day is for releases?
the stand-up | time
We meet for the stand-up at {v}. ; The stand-up starts at {v}. ; The team gathers at {v}.
When do we meet for the stand-up? ; When does the stand-up start? ; When does the team gather?
the deploy window | time
Deployments are allowed at {v}. ; We may only deploy at {v}. ; Deploys go out at {v}.
When are deployments allowed? ; When may we deploy? ; When do deploys go out?
the meeting room | title
We meet in the room {v}. ; Our meetings are in {v}. ; I booked {v} for the meeting.
Which room do we meet in? ; Where are our meetings? ; What did I book for the meeting?
the budget | amount
We may spend {v}. ; They gave us {v} for the project. ; We have {v} in all.
How much may we spend? ; How much did they give us for the project? ; How much do we have in all?
the team size | number
There are {v} of us on the team. ; We are {v} people on this. ; The team has grown to {v}.
How many of us are there? ; How many people are we on this? ; To what size has the team grown?
the open ticket | code
I am on ticket {v}. ; I am fixing {v} at the moment. ; I picked up ticket {v}.
Which ticket am I on? ; What am I fixing at the moment? ; Which ticket did I pick up?
the retry limit | number
It gives up after {v} attempts. ; It tries {v} times at most. ; After {v} failures it stops trying.
After how many attempts does it give up? ; How often does it try at most? ; After how many failures does it stop?
the timeout in seconds | number
A call may take {v} seconds. ; We cut calls off after {v} seconds. ; It waits {v} seconds for an answer.
How many seconds may a call take? ; After how long do we cut calls off? ; How long does it wait for an answer?
the batch size | number
We process {v} rows at a time. ; Each batch has {v} rows. ; It takes {v} rows per batch.
How many rows do we process at a time? ; How many rows does each batch have? ; How large is a batch?
the number of workers | number
It runs with {v} workers. ; We start {v} workers. ; There are {v} workers in the pool.
How many workers does it run with? ; How many workers do we start? ; How many workers are in the pool?
the test coverage | number
The tests cover {v} percent. ; We are at {v} percent coverage. ; Coverage went up to {v} percent.
How much do the tests cover? ; At what coverage are we? ; To what did coverage go up?
the feature flag | word
It is hidden behind the flag {v}. ; The flag {v} switches it on. ; To see it you enable {v}.
Which flag is it hidden behind? ; Which flag switches it on? ; What do you enable to see it?
""",
    "analysis": """
the data set | title
We are looking at the data set {v}. ; We analyse the data set {v}. ; The data set {v} is what we have.
Which data set are we looking at? ; Which data set do we analyse? ; Which data set do we have?
the source file | path
The numbers come from {v}. ; I loaded the raw data from {v}. ; The input is {v}.
Where do the numbers come from? ; From where did I load the raw data? ; Which file is the input?
the target column | word
We predict the column {v}. ; The label is in {v}. ; The model has to predict {v}.
Which column do we predict? ; Which column is the label in? ; What does the model have to predict?
the grouping column | word
Results are grouped by {v}. ; I group the rows by {v}. ; There is one bar for each {v}.
What are results grouped by? ; By what do I group the rows? ; For each what is there one bar?
the join key | word
The tables are joined on {v}. ; Both tables have {v} in common. ; I match the rows by {v}.
What are the tables joined on? ; What do both tables have in common? ; By what do I match the rows?
the baseline | phrase
We compare against {v}. ; The method to beat is {v}. ; As a baseline we take {v}.
What do we compare against? ; Which method is to beat? ; What do we take as a baseline?
the number of rows | number
The table has {v} rows. ; There are {v} rows in the table. ; After cleaning {v} rows are left.
How many rows does the table have? ; How many rows are in the table? ; How many rows are left after cleaning?
the sample size | number
We drew {v} samples. ; The study has {v} people in it. ; We asked {v} people.
How many samples did we draw? ; How many people does the study have? ; How many people did we ask?
the random seed | number
I always use the seed {v}. ; Set the seed to {v}. ; The run was seeded with {v}.
Which seed do I always use? ; To what do I set the seed? ; With what was the run seeded?
the threshold | number
Anything above {v} counts as a hit. ; The cut is at {v}. ; We call it a hit from {v} on.
Above what does something count as a hit? ; Where is the cut? ; From what value on do we call it a hit?
the outlier limit | number
Values beyond {v} are dropped. ; I throw out whatever is above {v}. ; Beyond {v} it is an outlier.
Beyond what are values dropped? ; Above what do I throw values out? ; From where on is it an outlier?
the number of clusters | number
We split it into {v} clusters. ; The data falls into {v} clusters. ; I asked for {v} clusters.
Into how many clusters do we split it? ; How many clusters does the data fall into? ; How many clusters did I ask for?
the average | number
On average it is {v}. ; The mean comes out at {v}. ; I get a mean of {v}.
What is it on average? ; At what does the mean come out? ; Which mean do I get?
the reporting month | month
The report covers {v}. ; We report about {v}. ; The figures are those of {v}.
Which month does the report cover? ; About which month do we report? ; Of which month are the figures?
the start of the period | date
The period starts on {v}. ; We count from {v}. ; The first day that we look at is {v}.
When does the period start? ; From when do we count? ; What is the first day that we look at?
the end of the period | date
The period ends on {v}. ; We count until {v}. ; The last day that we look at is {v}.
When does the period end? ; Until when do we count? ; What is the last day that we look at?
the currency | word
All sums are in {v}. ; I converted everything to {v}. ; Prices are given in {v}.
What are all sums in? ; To what did I convert everything? ; In what are prices given?
the region | city
We only look at stores in {v}. ; The stores are all in {v}. ; I left out everything but {v}.
Where are the stores that we look at? ; Where are all the stores? ; Everything but which region did I leave out?
the best model so far | word
{v} has the lowest error so far. ; So far nothing beats {v}. ; The model in the lead is {v}.
What has the lowest error so far? ; What does nothing beat so far? ; Which model is in the lead?
the chart colour | colour
Draw our line in {v}. ; In the chart we are {v}. ; Our bars are {v}.
What do I draw our line in? ; Which colour are we in the chart? ; Which colour are our bars?
the output folder | path
Results go to {v}. ; I save everything under {v}. ; You find the results in {v}.
Where do results go? ; Under what do I save everything? ; Where do you find the results?
the report's title | phrase
The report is headed {v}. ; On the cover of the report it says {v}. ; We call the report {v}.
What is the report headed? ; What does it say on the cover of the report? ; What do we call the report?
the report's reader | name
{v} is going to read the report. ; The report is for {v}. ; I write the report for {v}.
Who is going to read the report? ; Who is the report for? ; For whom do I write the report?
""",
    "customer": """
the customer's name | name
I have {v} on the phone. ; The customer is {v}. ; The person who called is {v}.
Who is on the phone? ; Who is the customer? ; Who is the person who called?
the customer's company | title
They are calling from {v}. ; The company is {v}. ; The customer works at {v}.
Which company are they calling from? ; Which company is it? ; Where does the customer work?
the customer's city | city
The customer lives in {v}. ; They are calling from a flat in {v}. ; We deliver to {v} for this customer.
Where does the customer live? ; In which city is the flat they call from? ; Where do we deliver for this customer?
the customer number | number
They are customer {v} with us. ; In our books they are number {v}. ; I found them under {v}.
Which customer number is it? ; Which number are they in our books? ; Under which number did I find them?
the extension | number
You reach them at extension {v}. ; Dial {v} to get through to them. ; Their extension is {v}.
At which extension do you reach them? ; What do I dial to get through to them? ; Which extension do they have?
the order number | code
It is about order {v}. ; They ordered it as {v}. ; Their order is filed under {v}.
Which order is it about? ; As what did they order it? ; Under what is their order filed?
the invoice number | code
They mean invoice {v}. ; We sent them invoice {v}. ; The bill that they got is {v}.
Which invoice do they mean? ; Which invoice did we send them? ; Which bill did they get?
the amount due | amount
They still owe us {v}. ; They have to pay {v}. ; On their account {v} are open.
How much do they still owe us? ; How much do they have to pay? ; How much is open on their account?
the refund | amount
We promised them {v} back. ; They get {v} back from us. ; I refunded {v} to them.
How much did we promise them back? ; How much do they get back from us? ; How much did I refund to them?
the product | title
They bought the {v}. ; The thing that broke is the {v}. ; At their home stands our {v}.
What did they buy? ; Which thing broke? ; What of ours stands at their home?
the quantity | number
They ordered {v} of them. ; They want {v} pieces. ; It was {v} pieces that they took.
How many of them did they order? ; How many pieces do they want? ; How many pieces did they take?
the device's colour | colour
Theirs is {v}. ; They took it in {v}. ; They chose the one in {v}.
Which colour is theirs? ; In which colour did they take it? ; Which colour did they choose?
the firmware | version
Their device runs firmware {v}. ; On their device I see firmware {v}. ; They never updated past {v}.
Which firmware does their device run? ; Which firmware do I see on their device? ; Past what did they never update?
the serial number | code
The label says {v}. ; On the back they read {v}. ; The device with the label {v} is theirs.
What does the label say? ; What do they read on the back? ; Which label does their device have?
the error code | code
The screen shows {v}. ; It stops with {v} on the screen. ; They see the error {v}.
What does the screen show? ; With what on the screen does it stop? ; Which error do they see?
the case number | code
I opened the case {v}. ; We handle it as case {v}. ; In our system it is {v}.
Which case did I open? ; As which case do we handle it? ; What is it in our system?
the case's status | status
The case is {v} right now. ; I have set the case to {v}. ; In the system the case stands at {v}.
How does the case stand? ; To what have I set the case? ; What does the system say about the case?
the technician | name
{v} is going to repair it. ; We send {v} to them. ; The repair is done by {v}.
Who is going to repair it? ; Whom do we send to them? ; By whom is the repair done?
the visit | date
The technician comes on {v}. ; Somebody visits them on {v}. ; We are at their door on {v}.
When does the technician come? ; When does somebody visit them? ; When are we at their door?
the callback time | time
I promised to call back at {v}. ; They want to be called at {v}. ; I will ring them at {v}.
When did I promise to call back? ; When do they want to be called? ; When will I ring them?
the delivery day | day
It is delivered on {v}. ; The parcel gets there on {v}. ; They have it in their hands on {v}.
On which day is it delivered? ; When does the parcel get there? ; When do they have it in their hands?
the courier | word
It is sent with {v}. ; We gave the parcel to {v}. ; The parcel is on its way with {v}.
Whom is it sent with? ; Whom did we give the parcel to? ; With whom is the parcel on its way?
the waiting time | number
They have been waiting for {v} days. ; It is {v} days since they wrote. ; They wrote to us {v} days ago.
For how many days have they been waiting? ; How many days is it since they wrote? ; How many days ago did they write?
the discount | number
We give them {v} percent off. ; They get {v} percent less to pay. ; I took {v} percent off the price.
How many percent off do we give them? ; How many percent less do they pay? ; How much did I take off the price?
the discount code | word
They may use the code {v}. ; They get it cheaper with the code {v}. ; I sent them the code {v}.
Which code may they use? ; With which code do they get it cheaper? ; Which code did I send them?
the contract's end | date
Their contract runs until {v}. ; They are bound to us until {v}. ; On {v} their contract is over.
Until when does their contract run? ; Until when are they bound to us? ; When is their contract over?
""",
}
