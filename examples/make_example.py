"""
Everything in examples/, made from nothing: a small world of true facts, the text from which a tiny
Qwen3 learns them, its tokenizer and random weights, and a multiple-choice set with rationales.

The one decision that is not obvious: the pretraining text holds every fact and every skill that the
questions need (knowing, and choosing among several), but no question with choices and no `Answer:`.
So the base model is about at chance, and what fine-tuning adds is the task. The evaluation set
holds out questions, not only rows.

    python examples/make_example.py                # tokenizer, questions; text and weights in runs/
    python sft.py --config examples/pretrain.yaml  # full fine-tuning, about ten minutes
    cp runs/tiny-qwen3/merged/model.safetensors examples/tiny-qwen3/
    python sft.py                                  # LoRA on the questions
    python dpo.py                                  # continues from there, on pairs of answers
"""

import json
import random
from collections import defaultdict, namedtuple
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"

# --------------------------------------------------------------------------------------------------
# 1. The world. A line is a thing, its columns are attributes; "-" is not asked, because the answer
# is not clear. A leading ~ marks a name without an article (rice, France).

ANIMALS = """
robin       | bird       | in gardens       | worms     | feathers    | two legs   | -         | -
eagle       | bird       | in the mountains | meat      | feathers    | two legs   | eaglet    | -
owl         | bird       | in the woods     | mice      | feathers    | two legs   | owlet     | hoots
duck        | bird       | on ponds         | -         | feathers    | two legs   | duckling  | quacks
hen         | bird       | on farms         | grain     | feathers    | two legs   | chick     | clucks
penguin     | bird       | on the ice       | fish      | feathers    | two legs   | -         | -
parrot      | bird       | in the jungle    | nuts      | feathers    | two legs   | -         | squawks
gull        | bird       | by the sea       | fish      | feathers    | two legs   | -         | -
swan        | bird       | on rivers        | -         | feathers    | two legs   | cygnet    | -
shark       | fish       | in the sea       | fish      | -           | no legs    | -         | -
trout       | fish       | in rivers        | insects   | scales      | no legs    | -         | -
goldfish    | fish       | in glass tanks   | -         | scales      | no legs    | -         | -
tuna        | fish       | in the sea       | fish      | scales      | no legs    | -         | -
carp        | fish       | in ponds         | -         | scales      | no legs    | -         | -
ant         | insect     | in nests         | -         | -           | six legs   | -         | -
bee         | insect     | in hives         | nectar    | -           | six legs   | -         | buzzes
butterfly   | insect     | in gardens       | nectar    | -           | six legs   | caterpillar | -
grasshopper | insect     | in meadows       | grass     | -           | six legs   | -         | chirps
moth        | insect     | -                | nectar    | -           | six legs   | caterpillar | -
beetle      | insect     | -                | -         | a hard case | six legs   | grub      | -
dog         | mammal     | in houses        | meat      | fur         | four legs  | puppy     | barks
cat         | mammal     | in houses        | mice      | fur         | four legs  | kitten    | purrs
cow         | mammal     | on farms         | grass     | -           | four legs  | calf      | moos
sheep       | mammal     | on farms         | grass     | wool        | four legs  | lamb      | bleats
horse       | mammal     | in stables       | hay       | -           | four legs  | foal      | neighs
pig         | mammal     | on farms         | -         | -           | four legs  | piglet    | oinks
donkey      | mammal     | in stables       | hay       | -           | four legs  | foal      | brays
goat        | mammal     | in the mountains | leaves    | -           | four legs  | kid       | bleats
lion        | mammal     | on the plains    | meat      | fur         | four legs  | cub       | roars
elephant    | mammal     | on the plains    | leaves    | -           | four legs  | calf      | trumpets
giraffe     | mammal     | on the plains    | leaves    | -           | four legs  | calf      | -
camel       | mammal     | in the desert    | -         | -           | four legs  | calf      | -
whale       | mammal     | in the sea       | -         | -           | no legs    | calf      | sings
seal        | mammal     | by the sea       | fish      | fur         | no legs    | pup       | -
bat         | mammal     | in caves         | insects   | fur         | -          | pup       | -
bear        | mammal     | in the woods     | -         | fur         | four legs  | cub       | growls
wolf        | mammal     | in the woods     | meat      | fur         | four legs  | -         | howls
mouse       | mammal     | in small holes   | seeds     | fur         | four legs  | -         | squeaks
rabbit      | mammal     | in burrows       | grass     | fur         | four legs  | -         | -
monkey      | mammal     | in the jungle    | fruit     | fur         | -          | -         | chatters
panda       | mammal     | in the mountains | bamboo    | fur         | four legs  | cub       | -
snake       | reptile    | -                | mice      | scales      | no legs    | -         | hisses
crocodile   | reptile    | in rivers        | meat      | scales      | four legs  | -         | -
lizard      | reptile    | in the desert    | insects   | scales      | four legs  | -         | -
tortoise    | reptile    | -                | leaves    | a shell     | four legs  | -         | -
frog        | amphibian  | in ponds         | insects   | smooth skin | four legs  | tadpole   | croaks
toad        | amphibian  | -                | insects   | -           | four legs  | tadpole   | croaks
newt        | amphibian  | in ponds         | -         | smooth skin | four legs  | -         | -
spider      | arachnid   | in webs          | insects   | -           | eight legs | -         | -
scorpion    | arachnid   | in the desert    | insects   | -           | eight legs | -         | -
crab        | crustacean | by the sea       | -         | a shell     | ten legs   | -         | -
lobster     | crustacean | in the sea       | -         | a shell     | ten legs   | -         | -
snail       | mollusc    | in gardens       | leaves    | a shell     | no legs    | -         | -
"""  # noqa: E501

PLANTS = """
apple      | fruit     | -      | on trees
banana     | fruit     | yellow | -
lemon      | fruit     | yellow | on trees
orange     | fruit     | orange | on trees
cherry     | fruit     | red    | on trees
plum       | fruit     | purple | on trees
pear       | fruit     | green  | on trees
lime       | fruit     | green  | on trees
strawberry | fruit     | red    | close to the ground
grape      | fruit     | -      | on vines
blueberry  | fruit     | blue   | on bushes
raspberry  | fruit     | red    | on bushes
gooseberry | fruit     | green  | on bushes
carrot     | vegetable | orange | under the ground
potato     | vegetable | brown  | under the ground
onion      | vegetable | -      | under the ground
beetroot   | vegetable | purple | under the ground
turnip     | vegetable | white  | under the ground
cabbage    | vegetable | green  | -
lettuce    | vegetable | green  | -
cauliflower | vegetable | white | -
pea        | vegetable | green  | in pods
bean       | vegetable | -      | in pods
~wheat     | grain     | golden | in dry fields
~barley    | grain     | golden | in dry fields
~maize     | grain     | yellow | in dry fields
~rice      | grain     | white  | in wet fields
walnut     | nut       | brown  | on trees
almond     | nut       | brown  | on trees
daisy      | flower    | white  | -
sunflower  | flower    | yellow | -
daffodil   | flower    | yellow | -
bluebell   | flower    | blue   | -
poppy      | flower    | red    | -
violet     | flower    | purple | -
oak        | tree      | -      | -
pine       | tree      | -      | -
willow     | tree      | -      | -
birch      | tree      | -      | -
"""

STUFF = """
~bread     | flour       | -      | -
~cake      | flour       | sweet  | -
~pasta     | flour       | -      | -
~cheese    | milk        | salty  | yellow
~butter    | milk        | -      | yellow
~yogurt    | milk        | sour   | white
~honey     | nectar      | sweet  | golden
~chocolate | cocoa beans | sweet  | brown
~jam       | fruit       | sweet  | -
~vinegar   | -           | sour   | -
~wine      | grapes      | -      | -
~cider     | apples      | -      | -
~bacon     | pork        | salty  | pink
~ham       | pork        | salty  | pink
~omelette  | eggs        | -      | yellow
~sugar     | -           | sweet  | white
~sea water | -           | salty  | -
~paper     | wood        | -      | white
~leather   | animal skin | -      | -
~glass     | sand        | -      | clear
~steel     | iron        | -      | grey
"""

TOOLS = """
hammer      | hitting nails      | steel   | the shed
saw         | cutting wood       | steel   | the shed
spade       | digging holes      | steel   | the shed
rake        | gathering leaves   | -       | the shed
lawnmower   | cutting grass      | -       | the shed
broom       | sweeping floors    | -       | -
kettle      | boiling water      | steel   | the kitchen
oven        | baking food        | steel   | the kitchen
fridge      | keeping food cold  | -       | the kitchen
spoon       | eating soup        | -       | the kitchen
cup         | drinking tea       | clay    | the kitchen
plate       | serving food       | clay    | the kitchen
bed         | sleeping           | -       | the bedroom
pillow      | resting the head   | cotton  | the bedroom
wardrobe    | hanging up clothes | wood    | the bedroom
blanket     | keeping warm       | wool    | the bedroom
sofa        | sitting together   | -       | the living room
television  | watching films     | -       | the living room
bath        | washing the body   | -       | the bathroom
toothbrush  | cleaning teeth     | plastic | the bathroom
shower      | washing the hair   | -       | the bathroom
towel       | drying the body    | cotton  | the bathroom
comb        | tidying hair       | plastic | -
mirror      | seeing your face   | glass   | -
pencil      | drawing            | wood    | the classroom
ruler       | measuring lines    | -       | the classroom
blackboard  | showing lessons    | -       | the classroom
book        | reading stories    | paper   | -
envelope    | sending letters    | paper   | -
window      | letting in light   | glass   | -
jar         | holding jam        | glass   | -
umbrella    | keeping off rain   | -       | -
clock       | telling the time   | -       | -
key         | opening locks      | steel   | -
needle      | sewing cloth       | steel   | -
ladder      | climbing up        | -       | -
tent        | camping            | -       | -
telescope   | looking at stars   | -       | -
compass     | finding north      | -       | -
camera      | taking pictures    | -       | -
thermometer | measuring heat     | -       | -
brick       | building walls     | clay    | -
tyre        | -                  | rubber  | -
coin        | paying             | metal   | -
saddle      | riding horses      | leather | -
candle      | -                  | wax     | -
jumper      | -                  | wool    | -
bucket      | carrying water     | plastic | -
"""

JOBS = """
baker        | bakes bread            | in a bakery       | an oven
teacher      | teaches children       | in a school       | -
doctor       | treats sick people     | in a hospital     | -
surgeon      | operates on people     | in a hospital     | a scalpel
farmer       | grows crops            | on a farm         | a tractor
pilot        | flies planes           | in the air        | -
sailor       | sails ships            | at sea            | -
chef         | cooks meals            | in a restaurant   | a pan
waiter       | serves meals           | in a restaurant   | a tray
builder      | builds houses          | on a building site | -
carpenter    | makes wooden furniture | in a workshop     | a saw
plumber      | mends pipes            | -                 | a wrench
artist       | paints pictures        | in a studio       | a brush
judge        | decides cases          | in a court        | -
firefighter  | puts out fires         | -                 | a hose
dentist      | looks after teeth      | -                 | -
vet          | treats sick animals    | -                 | -
librarian    | lends books            | in a library      | -
postman      | delivers letters       | -                 | -
tailor       | sews clothes           | -                 | a needle
barber       | cuts hair              | -                 | scissors
butcher      | sells meat             | -                 | -
florist      | sells flowers          | -                 | -
fisherman    | catches fish           | at sea            | a net
miner        | digs coal              | under the ground  | a pickaxe
shepherd     | looks after sheep      | -                 | -
gardener     | plants flowers         | in a garden       | a spade
astronaut    | explores space         | in space          | a rocket
actor        | performs plays         | in a theatre      | -
mechanic     | repairs cars           | in a garage       | a spanner
blacksmith   | shapes hot iron        | in a forge        | an anvil
scientist    | does experiments       | in a laboratory   | a microscope
photographer | takes pictures         | in a studio       | a camera
author       | writes books           | -                 | -
"""

COUNTRIES = """
~France      | Paris        | Europe        | French
~Spain       | Madrid       | Europe        | Spanish
~Italy       | Rome         | Europe        | Italian
~Germany     | Berlin       | Europe        | German
~Greece      | Athens       | Europe        | Greek
~Poland      | Warsaw       | Europe        | Polish
~Norway      | Oslo         | Europe        | Norwegian
~Portugal    | Lisbon       | Europe        | Portuguese
~Austria     | Vienna       | Europe        | German
~Japan       | Tokyo        | Asia          | Japanese
~China       | Beijing      | Asia          | Chinese
~India       | New Delhi    | Asia          | -
~Thailand    | Bangkok      | Asia          | Thai
~Vietnam     | Hanoi        | Asia          | -
~Iran        | Tehran       | Asia          | -
~Egypt       | Cairo        | Africa        | Arabic
~Morocco     | Rabat        | Africa        | Arabic
~Kenya       | Nairobi      | Africa        | -
~Ghana       | Accra        | Africa        | -
~Senegal     | Dakar        | Africa        | -
~Canada      | Ottawa       | North America | -
~Mexico      | -            | North America | Spanish
~Cuba        | Havana       | North America | Spanish
~Brazil      | -            | South America | Portuguese
~Peru        | Lima         | South America | Spanish
~Chile       | Santiago     | South America | Spanish
~Argentina   | Buenos Aires | South America | Spanish
"""

VEHICLES = """
car        | on roads          | an engine
bus        | on roads          | an engine
lorry      | on roads          | an engine
bicycle    | on roads          | pedals
train      | on rails          | an engine
tram       | on rails          | electricity
ferry      | on the water      | an engine
canoe      | on the water      | a paddle
rowing boat | on the water     | oars
yacht      | on the water      | the wind
submarine  | under the water   | -
plane      | through the air   | an engine
glider     | through the air   | the wind
helicopter | through the air   | an engine
sledge     | over snow         | dogs
rocket     | into space        | -
"""

INSTRUMENTS = """
piano     | pressing keys
organ     | pressing keys
guitar    | plucking strings
harp      | plucking strings
banjo     | plucking strings
violin    | drawing a bow
cello     | drawing a bow
drum      | hitting it
gong      | hitting it
xylophone | hitting it
flute     | blowing into it
trumpet   | blowing into it
clarinet  | blowing into it
tuba      | blowing into it
"""

CLOTHES = """
hat      | the head
cap      | the head
helmet   | the head
crown    | the head
glove    | the hand
mitten   | the hand
sock     | the foot
shoe     | the foot
boot     | the foot
slipper  | the foot
scarf    | the neck
tie      | the neck
necklace | the neck
ring     | the finger
belt     | the waist
watch    | the wrist
bracelet | the wrist
"""

SPORTS = """
~football   | on a pitch  | a ball
~tennis     | on a court  | a racket
~badminton  | on a court  | a racket
~swimming   | in a pool   | -
~diving     | in a pool   | -
~skiing     | on snow     | -
~skating    | on ice      | -
~golf       | on a course | a club
~boxing     | in a ring   | gloves
~rowing     | on a river  | oars
~archery    | -           | a bow
~chess      | on a board  | -
~draughts   | on a board  | -
~rugby      | on a pitch  | a ball
"""

PLACES = """
library     | borrow books
hospital    | get well
bakery      | buy bread
school      | learn
cinema      | watch films
theatre     | watch plays
museum      | see old things
zoo         | see wild animals
airport     | catch a plane
harbour     | board a ship
bank        | keep money
restaurant  | eat a meal
hotel       | stay the night
gym         | do exercises
post office | send parcels
pharmacy    | buy medicine
stadium     | watch matches
petrol station | buy fuel
"""

BODY = """
eye     | seeing
ear     | hearing
nose    | smelling
tongue  | tasting
tooth   | chewing
heart   | pumping blood
lung    | breathing
brain   | thinking
stomach | digesting food
skin    | feeling
"""

MONTHS = """
~January   | winter | February
~February  | winter | March
~March     | spring | April
~April     | spring | May
~May       | spring | June
~June      | summer | July
~July      | summer | August
~August    | summer | September
~September | autumn | October
~October   | autumn | November
~November  | autumn | December
~December  | winter | January
"""

SHAPES = """
circle   | no corners
triangle | three corners
square   | four corners
rectangle | four corners
pentagon | five corners
hexagon  | six corners
octagon  | eight corners
"""

# why a thing is of its kind: stated in the pretraining text too
REASONS = {
    "bird": "has feathers and lays eggs",
    "fish": "lives in water and breathes with gills",
    "insect": "has six legs and a body in three parts",
    "mammal": "feeds its young on milk",
    "reptile": "has scales and warms itself in the sun",
    "amphibian": "begins life in water and then lives on land",
    "arachnid": "has eight legs",
    "crustacean": "has ten legs and a hard shell",
    "mollusc": "has a soft body and no bones",
    "fruit": "is sweet or sour and holds seeds",
    "vegetable": "is put in soups and salads",
    "grain": "is a grass whose seeds are eaten",
    "nut": "has a hard shell with a seed inside",
    "flower": "has bright petals",
    "tree": "has a tall trunk of wood",
}

# `says` are statements, the first of which is the rationale; {e} is the thing, {v} the attribute.
# `asks` want the attribute of a thing, `which` wants the thing with an attribute.
# `close` are groups of attributes that could all be defended: never choices of the same question.
Relation = namedtuple("Relation", "key table column says asks which close", defaults=((),))

# fmt: off
RELATIONS = [
    Relation("class", ANIMALS, 1,
        ["{e} is {a} {v}", "{e} belongs to the {vs}"],
        ["What kind of animal is {e}?", "Which group does {e} belong to?"],
        ["Which of these is {a} {v}?", "Which animal is {a} {v}?"]),
    Relation("home", ANIMALS, 2,
        ["{e} lives {v}", "The home of {e} is {v}"],
        ["Where does {e} live?", "Where would you find {e}?"],
        ["Which of these lives {v}?", "Which animal would you find {v}?"],
        ["in gardens|in meadows|in the woods|in burrows|in small holes|in nests|in hives|in webs|in caves|in ponds",  # noqa: E501
         "in the sea|by the sea|on the ice",
         "in rivers|on rivers|in ponds|on ponds|in glass tanks",
         "on farms|in stables|in houses|in gardens|in meadows|in small holes|on ponds|in the mountains",  # noqa: E501
         "in the woods|in the mountains|in the jungle|in caves|on the plains",
         "in the desert|in the jungle|in the mountains",
         "on the plains|in the desert|in meadows|in burrows",
         "in houses|in webs|in glass tanks|in small holes|in burrows"]),
    Relation("food", ANIMALS, 3,
        ["{e} eats {v}", "The food of {e} is {v}"],
        ["What does {e} eat?", "What is the food of {e}?"],
        ["Which of these eats {v}?", "Which animal feeds on {v}?"],
        ["meat|fish|mice", "grass|hay|leaves|bamboo", "grain|seeds|nuts|fruit|leaves|grass",
         "worms|insects|fruit|nectar|grain|seeds"]),
    Relation("cover", ANIMALS, 4,
        ["{e} is covered with {v}", "The body of {e} has {v}"],
        ["What covers the body of {e}?", "What is {e} covered with?"],
        ["Which of these is covered with {v}?", "Which animal has {v}?"],
        ["fur|wool", "a shell|a hard case"]),
    Relation("legs", ANIMALS, 5,
        ["{e} has {v}", "Count and see: {e} has {v}"],
        ["How many legs does {e} have?"],
        ["Which of these has {v}?", "Which animal has {v}?"]),
    Relation("young", ANIMALS, 6,
        ["The child of {e} is {a} {v}", "A young {n} is called {a} {v}"],
        ["What is a young {n} called?", "What is the child of {e}?"],
        ["Which animal has {a} {v} as its child?"]),
    Relation("sound", ANIMALS, 7,
        ["{e} {v}", "The animal that {v} is {e}"],
        ["What sound does {e} make?"],
        ["Which of these {v}?", "Which animal {v}?"]),
    Relation("kind", PLANTS, 1,
        ["{e} is {a} {v}", "{e} belongs to the {vs}"],
        ["What kind of plant is {e}?", "Which group does {e} belong to?"],
        ["Which of these is {a} {v}?", "Which plant is {a} {v}?"],
        ["fruit|vegetable|nut|grain"]),
    Relation("colour", PLANTS, 2,
        ["{e} is {v}", "The colour of {e} is {v}"],
        ["What colour is {e}?", "What is the colour of {e}?"],
        ["Which of these is {v}?", "Which plant is coloured {v}?"],
        ["yellow|golden|orange|brown", "red|purple|blue"]),
    Relation("grows", PLANTS, 3,
        ["{e} grows {v}", "To gather {e}, look {v}"],
        ["Where does {e} grow?", "Where do you look to gather {e}?"],
        ["Which of these grows {v}?", "Which plant grows {v}?"],
        ["on vines|in pods|on bushes|close to the ground"]),
    Relation("source", STUFF, 1,
        ["{e} is made from {v}", "People turn {v} into {e}"],
        ["What is {e} made from?", "What do people turn into {e}?"],
        ["Which of these is made from {v}?", "What do people make from {v}?"],
        ["fruit|grapes|apples|nectar", "pork|animal skin|eggs|milk", "flour|eggs|milk"]),
    Relation("taste", STUFF, 2,
        ["{e} tastes {v}", "The taste of {e} is {v}"],
        [],
        ["Which of these tastes {v}?", "Which one has a {v} taste?"],
        ["sweet|sour"]),
    Relation("look", STUFF, 3,
        ["{e} is {v}", "The colour of {e} is {v}"],
        ["What colour is {e}?", "What is the colour of {e}?"],
        ["Which of these is {v}?"],
        ["yellow|golden|brown", "white|clear|grey", "pink|brown"]),
    Relation("use", TOOLS, 1,
        ["{e} is used for {v}", "For {v} you need {e}"],
        ["What is {e} used for?", "What do you need {e} for?"],
        ["Which of these is used for {v}?", "What do you need for {v}?"],
        ["washing the body|drying the body|washing the hair|tidying hair",
         "sleeping|resting the head|keeping warm|camping|sitting together",
         "drawing|showing lessons|measuring lines", "baking food|serving food|keeping food cold",
         "digging holes|gathering leaves",
         "looking at stars|seeing your face|taking pictures|letting in light",
         "carrying water|boiling water|holding jam"]),
    Relation("material", TOOLS, 2,
        ["{e} is made of {v}", "People use {v} to make {e}"],
        ["What is {e} made of?", "What do people use to make {e}?"],
        ["Which of these is made of {v}?", "What is made out of {v}?"],
        ["steel|metal|plastic", "clay|glass|plastic|metal|steel", "wool|cotton",
         "wood|plastic|steel"]),
    Relation("room", TOOLS, 3,
        ["{e} is kept in {v}", "In {v} there is {e}"],
        ["Where is {e} kept?", "In which room is {e}?"],
        ["Which of these is kept in {v}?", "What would you look for in {v}?"],
        ["the bedroom|the living room|the bathroom"]),
    Relation("work", JOBS, 1,
        ["{e} {v}", "The person who {v} is {e}"],
        ["What does {e} do?", "What is the work of {e}?"],
        ["Which of these {v}?", "Who {v}?"],
        ["treats sick people|operates on people|looks after teeth",
         "cooks meals|serves meals|bakes bread"]),
    Relation("workplace", JOBS, 2,
        ["{e} works {v}", "You will find {e} {v}"],
        ["Where does {e} work?", "Where will you find {e}?"],
        ["Which of these works {v}?", "Who works {v}?"],
        ["in a workshop|in a studio|in a forge|in a garage", "on a farm|in a garden",
         "in a restaurant|in a bakery", "in the air|in space", "on a building site|in a garage"]),
    Relation("tool", JOBS, 3,
        ["{e} uses {v}", "The tool of {e} is {v}"],
        ["What does {e} use?", "What is the tool of {e}?"],
        ["Which of these uses {v}?", "Who needs {v}?"],
        ["a needle|scissors|a scalpel|a brush|a camera", "a saw|a spanner|a wrench|an anvil",
         "a spade|a pickaxe|a tractor|a hose", "a pan|an oven|a tray"]),
    Relation("capital", COUNTRIES, 1,
        ["The capital of {e} is {v}", "{v} is the capital of {e}"],
        ["What is the capital of {e}?", "Which city is the capital of {e}?"],
        ["Which country has {v} as its capital?", "{v} is the capital of which country?"]),
    Relation("continent", COUNTRIES, 2,
        ["{e} is in {v}", "You can find {e} in {v}"],
        ["Where is {e}?", "Which part of the world is {e} in?"],
        ["Which of these is in {v}?", "Which country is in {v}?"]),
    Relation("language", COUNTRIES, 3,
        ["The people of {e} speak {v}", "In {e} you hear {v}"],
        ["What do the people of {e} speak?", "Which language do you hear in {e}?"],
        ["Where do people speak {v}?", "In which country do you hear {v}?"]),
    Relation("way", VEHICLES, 1,
        ["{e} travels {v}", "To go {v} you can take {e}"],
        ["Where does {e} travel?", "How does {e} go?"],
        ["Which of these travels {v}?", "What goes {v}?"],
        ["through the air|into space"]),
    Relation("power", VEHICLES, 2,
        ["{e} is moved by {v}", "The power of {e} comes from {v}"],
        ["What moves {e}?", "Where does the power of {e} come from?"],
        ["Which of these is moved by {v}?"],
        ["an engine|electricity|the wind", "oars|a paddle"]),
    Relation("playing", INSTRUMENTS, 1,
        ["You play {e} by {v}", "By {v} you make music on {e}"],
        ["How do you play {e}?", "How do you make music on {e}?"],
        ["Which of these do you play by {v}?", "Which instrument do you play by {v}?"],
        ["plucking strings|drawing a bow"]),
    Relation("worn", CLOTHES, 1,
        ["{e} is worn on {v}", "On {v} you can put {e}"],
        ["Where is {e} worn?", "Where do you put {e}?"],
        ["Which of these is worn on {v}?", "What can you put on {v}?"],
        ["the hand|the finger|the wrist"]),
    Relation("ground", SPORTS, 1,
        ["People go in for {e} {v}", "The place for {e} is {v}"],
        ["Where do people go in for {e}?", "What is the place for {e}?"],
        ["Which of these takes place {v}?", "Which sport takes place {v}?"],
        ["on a pitch|on a court|on a course", "on snow|on ice", "in a pool|on a river"]),
    Relation("kit", SPORTS, 2,
        ["For {e} you need {v}", "With {v} you can go in for {e}"],
        ["What do you need for {e}?"],
        ["For which of these do you need {v}?", "Which sport needs {v}?"],
        ["a ball|a racket|a club"]),
    Relation("visit", PLACES, 1,
        ["People go to {e} to {v}", "To {v} you go to {e}"],
        ["Why do people go to {e}?", "What can you do at {e}?"],
        ["Where do people go to {v}?", "Where can you {v}?"],
        ["get well|buy medicine", "learn|borrow books|see old things",
         "watch films|watch plays|watch matches", "keep money|send parcels"]),
    Relation("organ", BODY, 1,
        ["{e} is for {v}", "For {v} you have {e}"],
        ["What is {e} for?", "What do you have {e} for?"],
        ["Which part of the body is for {v}?", "What do you have for {v}?"],
        ["tasting|chewing|digesting food|smelling|breathing"]),
    Relation("season", MONTHS, 1,
        ["{e} is in {v}", "The season of {e} is {v}"],
        ["In which season is {e}?", "What is the season of {e}?"],
        ["Which of these months is in {v}?", "Which month is in {v}?"]),
    Relation("next", MONTHS, 2,
        ["After {e} comes {v}", "The month after {e} is {v}"],
        ["Which month comes after {e}?", "What comes after {e}?"],
        ["Which month is just before {v}?"]),
    Relation("corners", SHAPES, 1,
        ["{e} has {v}", "A shape with {v} is {e}"],
        ["How many corners does {e} have?"],
        ["Which of these has {v}?", "Which shape has {v}?"]),
]
# fmt: on

Fact = namedtuple("Fact", "relation name article value")  # relation by its place in RELATIONS


def facts():
    out = []
    for r, relation in enumerate(RELATIONS):
        for line in relation.table.strip().splitlines():
            cells = [cell.strip() for cell in line.split("|")]
            if cells[relation.column] != "-":
                name = cells[0].lstrip("~")
                article = "" if cells[0].startswith("~") else a(name)
                out.append(Fact(r, name, article, cells[relation.column]))
    return out


def a(word):
    return "an" if word[0] in "aeiou" and not word.startswith("un") or word == "umbrella" else "a"


def capital(text):
    return text[0].upper() + text[1:]


def fill(template, fact):
    e = f"{fact.article} {fact.name}".strip()
    vs = fact.value if fact.value == "fish" else fact.value + "s"
    return capital(template.format(e=e, n=fact.name, v=fact.value, a=a(fact.value), vs=vs))


def rivals(fact, own):
    """Of the facts `own` of a relation, those that are certainly wrong in place of `fact`: another
    thing, whose attribute is neither the same nor close."""
    groups = [set(group.split("|")) for group in RELATIONS[fact.relation].close]

    def is_close(value):
        return any({value, fact.value} <= group for group in groups)

    others = [f for f in own if f.name != fact.name and f.value != fact.value]
    return [f for f in others if not is_close(f.value)]


# --------------------------------------------------------------------------------------------------
# 2. The pretraining text: statements, portraits, lists, and choices among several in prose.


def text_rows(world, rng, n_rows):
    by_thing, by_value, by_relation = (
        defaultdict(list),
        defaultdict(list),
        defaultdict(list),
    )
    for fact in world:
        by_thing[RELATIONS[fact.relation].table, fact.name].append(fact)
        by_value[fact.relation, fact.value].append(fact)
        by_relation[fact.relation].append(fact)
    things, values = list(by_thing.values()), list(by_value.values())
    relations = list(by_relation)
    number = ["one", "two", "three", "four", "five", "six"]

    def say(fact):
        return fill(rng.choice(RELATIONS[fact.relation].says), fact) + "."

    def why(fact):
        return (
            f"{fill('{e}', fact)} {REASONS[fact.value]}, so it is {a(fact.value)} {fact.value}."
        )

    def statements():
        return " ".join(say(rng.choice(world)) for _ in range(rng.randint(3, 6)))

    def portrait():
        own = rng.choice(things)
        text = [say(fact) for fact in rng.sample(own, len(own))]
        text += [why(fact) for fact in own if fact.value in REASONS]
        return " ".join(rng.sample(text, len(text)))

    def group():
        own = rng.choice(values)
        own = rng.sample(own, min(len(own), 6))
        claim = fill(RELATIONS[own[0].relation].says[0], own[0])
        if len(own) == 1:
            return claim + "."
        return f"{claim}. The same is true of: {', '.join(fact.name for fact in own[1:])}."

    def some_rivals(fact):
        pool = rivals(fact, by_relation[fact.relation])
        return rng.sample(pool, min(rng.randint(1, 4), len(pool)))

    def pick_thing():  # "Among ant, robin and trout, one of them lives in gardens: the robin."
        fact = rng.choice(by_relation[rng.choice(relations)])
        names = [fact.name] + list(dict.fromkeys(f.name for f in some_rivals(fact)))
        claim = fill(
            RELATIONS[fact.relation].says[0], fact._replace(name="of them", article="one")
        )
        text = f"Among {join(shuffled(names))}, {claim[0].lower() + claim[1:]}: "
        if fact.value in REASONS and rng.random() < 0.5:
            return text + why(fact)
        return text + say(fact)

    def shuffled(items):
        return rng.sample(items, len(items))

    def join(items):
        return ", ".join(items[:-1]) + (" and " if len(items) > 1 else "") + items[-1]

    def chat():
        if rng.random() < 0.5:
            own = rng.choice(things)
            fact, shown = own[0], rng.sample(own, min(len(own), 3))
            name = f"{fact.article} {fact.name}".strip()
            return f"Tell me about {name}.", " ".join(say(f) for f in shown)
        own = rng.choice([v for v in values if len(v) > 3])
        k = rng.randint(2, 4)
        claim = fill(RELATIONS[own[0].relation].says[0], own[0])
        names = ", ".join(f.name for f in rng.sample(own, k))
        return f"Name {number[k - 1]} like this: {claim}.", names + "."

    kinds = [(statements, 3), (portrait, 3), (group, 1), (pick_thing, 6)]
    for _ in range(n_rows):
        if rng.random() < 0.15:
            turns = zip(("user", "assistant"), chat())
            yield {"text": "".join(f"<|im_start|>{r}\n{text}<|im_end|>\n" for r, text in turns)}
        else:
            some = rng.choices([k for k, _ in kinds], [w for _, w in kinds], k=4)
            yield {"text": "\n".join(kind() for kind in some)}


# --------------------------------------------------------------------------------------------------
# 3. The questions.


def questions(world, rng, n_train, n_validation):
    """Rows for training and validation. Of every fact with several wordings one is kept for
    validation: that question with that answer never occurs in training, whatever its choices. A
    question may come again with other choices."""
    by_relation = defaultdict(list)
    for fact in world:
        by_relation[fact.relation].append(fact)
    pairs = {"train": [], "validation": []}
    for fact in world:
        if " " in fact.name:
            continue
        which = RELATIONS[fact.relation].which
        wordings = rng.sample(which, len(which))
        for i, wording in enumerate(wordings):
            pairs["validation" if i == 1 else "train"].append((fact, wording))
    rows = {}
    for split, n in (("train", n_train), ("validation", n_validation)):
        rows[split] = []
        while len(rows[split]) < n:
            for fact, wording in rng.sample(pairs[split], len(pairs[split])):
                row = question(
                    fact, wording, by_relation[fact.relation], len(rows[split]) % 4, rng
                )
                if row and row not in rows[split] and len(rows[split]) < n:
                    rows[split].append(row)
        rng.shuffle(rows[split])
    return rows["train"], rows["validation"]


def question(fact, template, facts_of_relation, place, rng):
    names = {f.name for f in rivals(fact, facts_of_relation)}
    wrong = sorted(name for name in names if " " not in name)
    if len(wrong) < 3:
        return None
    choices = rng.sample(wrong, 3)
    choices.insert(place, fact.name)
    ask = f"{fill(template, fact).rstrip('?')}: {', '.join(choices[:3])} or {choices[3]}?"
    answer = f"{fill(RELATIONS[fact.relation].says[0], fact)}.\nAnswer: {fact.name}"
    return {
        "messages": [
            {"role": "user", "content": ask},
            {"role": "assistant", "content": answer},
        ],
        "choices": choices,
    }


def preferences(rows, world, rng):
    """Pairs: the right statement and answer against those of one of the wrong choices."""
    by_statement = {f"{fill(RELATIONS[fact.relation].says[0], fact)}.": fact for fact in world}
    articles = {(fact.relation, fact.name): fact.article for fact in world}
    for row in rows:
        ask, right = (message["content"] for message in row["messages"])
        fact = by_statement[right.split("\n")[0]]
        wrong = rng.choice([name for name in row["choices"] if name != fact.name])
        rival = fact._replace(name=wrong, article=articles[fact.relation, wrong])
        claim = fill(RELATIONS[fact.relation].says[0], rival)
        yield {
            "prompt": [{"role": "user", "content": ask}],
            "chosen": right,
            "rejected": f"{claim}.\nAnswer: {wrong}",
            "choices": row["choices"],
        }


# --------------------------------------------------------------------------------------------------
# 4. The checkpoint: tokenizer, template, configuration, random weights.

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 2048,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 4,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


# Qwen's pattern: contractions, words, single digits, punctuation, white space
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts):
    import tokenizers
    from tokenizers import pre_tokenizers

    pattern = tokenizers.Regex(SPLIT)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(pattern, "isolated")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == CONFIG["vocab_size"]
    return tokenizer


def random_weights(seed):
    """Normal weights, norms at one. A narrow model learns to look things up several times sooner
    when the blocks do not drown its embeddings: std 0.1 for embeddings, 0.05 for matrices, divided
    by sqrt(2 L) for those that write to the residual stream (GPT-2's rule, Radford et al. 2019,
    section 2.3). The first query head of each group begins as its key head."""
    import torch

    c, generator = CONFIG, torch.Generator().manual_seed(seed)
    head, kv_heads = c["head_dim"], c["num_key_value_heads"]
    q, kv = c["num_attention_heads"] * head, kv_heads * head
    hidden, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    block = {  # in the order of the random numbers; k_proj before q_proj, which copies it
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.q_proj": (q, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {
        "model.embed_tokens.weight": (c["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            weights[name] = torch.ones(shape)
            continue
        std = 0.1 if "embed" in name else 0.05
        if "o_proj" in name or "down_proj" in name:
            std = 0.05 / (2 * layers) ** 0.5
        weights[name] = torch.randn(shape, generator=generator) * std
        if "q_proj" in name:
            k = weights[name.replace("q_proj", "k_proj")].view(kv_heads, head, hidden)
            weights[name].view(kv_heads, -1, head, hidden)[:, 0] = k
    return weights


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path.relative_to(HERE.parent)}: {len(rows)} rows")


GENERATION_CONFIG = {"do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0}
ADDED_TOKEN = {
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": True,
}
TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
    "errors": "replace",
    "added_tokens_decoder": {
        str(i): {"content": token} | ADDED_TOKEN for i, token in enumerate(SPECIAL)
    },
}


def write_checkpoint(folder, tokenizer):
    write_json(folder / "config.json", CONFIG)
    write_json(folder / "generation_config.json", GENERATION_CONFIG)
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main():
    from safetensors.torch import save_file

    world = facts()
    things = {(RELATIONS[fact.relation].table, fact.name) for fact in world}
    print(f"{len(things)} things, {len(RELATIONS)} attributes, {len(world)} facts")
    text = list(text_rows(world, random.Random(1), 40000))
    train, validation = questions(world, random.Random(2), 3200, 200)
    write_rows(RUNS / "tiny-qwen3-start" / "text.jsonl", text)
    write_rows(HERE / "mcqa" / "train.jsonl", train)
    write_rows(HERE / "mcqa" / "validation.jsonl", validation)
    for name, rows in (("train", train[:800]), ("validation", validation)):
        pairs = list(preferences(rows, world, random.Random(3)))
        write_rows(HERE / "mcqa" / f"{name}_pairs.jsonl", pairs)
    # each wording once per fact and every name often, so that rare words become tokens; no question
    # of the rows
    texts = []
    for fact in world:
        relation = RELATIONS[fact.relation]
        texts += [fill(template, fact) for template in relation.says + relation.which]
    texts += [f" {fact.name}" for fact in world] * 40
    tokenizer = train_tokenizer(texts + ["Answer: user assistant"] * 40)
    for folder in (HERE / "tiny-qwen3", RUNS / "tiny-qwen3-start"):
        write_checkpoint(folder, tokenizer)
    file = RUNS / "tiny-qwen3-start" / "model.safetensors"
    save_file(random_weights(0), file, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
