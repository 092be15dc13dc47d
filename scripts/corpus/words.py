"""Word lists of the small world that the embedded model knows: plain tables, one row per line.

Nothing here is random. Facts that tie people to the rest of the world (who lives where, who has which pet) are drawn in
:mod:`corpus.world` from a fixed seed.
"""

from __future__ import annotations


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split())


WOMEN = _listed("""
Anna Lucy Mary Rosa Emma Clara Julia Nina Sara Helen Alice Grace Ruth Vera Dora Ella Fiona Greta Hanna Irene
Jane Karen Laura Maria Nora Olga Paula Rita Susan Tina Wendy Zoe
""")

MEN = _listed("""
Tom Ben Paul John Peter Mark Luke David Simon Oscar Adam Carl Daniel Edward Frank George Henry Ivan Jack Kevin
Leo Martin Noah Otto Philip Ralph Samuel Theo Victor Walter Xavier Robert
""")

COLOURS = _listed("""
red blue green yellow white black brown pink grey purple orange golden
""")

PLACES = _listed("""
garden kitchen barn mill farm school market church forest harbour castle cellar attic stable library tower
bakery station ferry meadow cave lagoon village theatre
""")

TOWNS = _listed("""
Oakton Milford Redhill Brookside Ashby Norwell Eastham Westbury Kingsley Langford Marlow Stoneferry Winfield
Dalton Harwick Fernley Elmwood Roxby Seaford Thornton Upham Valemont Yarrow Cromer
""")

NUMBERS = _listed("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen
""")

FRUITS = _listed("""
apples pears plums nuts eggs cakes buns figs grapes lemons cherries beans
""")

# animal, food, home, sound, young, number of the group's colour
ANIMALS = """
cow grass barn moos calf brown
dog bones kennel barks puppy black
cat fish basket purrs kitten grey
hen corn coop clucks chick white
pig roots sty grunts piglet pink
horse oats stable neighs foal brown
sheep clover fold bleats lamb white
bee honey hive buzzes larva yellow
frog flies pond croaks tadpole green
lion meat plain roars cub golden
bear berries den growls cub black
wolf deer lair howls pup grey
mouse cheese hole squeaks pinky grey
duck weeds lake quacks duckling yellow
owl mice hollow hoots owlet brown
snake rats pit hisses snakelet green
crow worms nest caws fledgling black
monkey bananas jungle chatters infant brown
goat leaves hillside bleats kid white
donkey hay shed brays foal grey
goose seeds marsh honks gosling white
fox rabbits burrow yelps kit red
seal squid beach barks pup grey
parrot fruit cage talks chick green
cricket crumbs hedge chirps nymph black
elephant bark savanna trumpets calf grey
whale shrimp ocean sings calf blue
squirrel acorns oak chatters kit red
turkey grain yard gobbles poult black
camel thorns desert grumbles calf golden
pigeon peas roof coos squab grey
spider moths web clicks spiderling black
"""

# object, material, what one does with it, room where it is kept
OBJECTS = """
cup glass drink kitchen
bowl clay eat kitchen
ball rubber play garden
hammer iron build cellar
hat wool dress attic
book paper read library
key iron unlock tower
spoon wood stir kitchen
knife steel cut bakery
lamp glass shine attic
bottle glass pour cellar
plate clay serve kitchen
chair wood sit school
rope hemp tie harbour
bucket iron carry stable
broom straw sweep barn
bell iron ring church
drum leather beat theatre
boot rubber walk stable
letter paper write station
coat wool dress castle
needle steel sew castle
axe steel chop forest
oar wood row harbour
vase clay decorate church
mirror glass look theatre
saddle leather ride stable
map paper travel station
tyre rubber drive farm
basket straw gather market
blanket wool sleep attic
flute wood blow theatre
belt leather fasten castle
candle wax shine church
doll wax play school
sack hemp carry mill
pan iron fry bakery
saw steel cut school
net hemp fish lagoon
purse leather pay market
"""

# material, what happens when it is dropped, put into water, left by the fire
MATERIALS = """
glass broke sank cracked
clay shattered sank hardened
rubber bounced floated melted
iron clanged sank glowed
steel rang sank reddened
wool flopped soaked smoked
paper fluttered dissolved burned
wood knocked floated burned
hemp flopped swelled smoked
straw rustled floated flared
leather slapped swelled shrank
wax dented floated melted
"""

# job, tool, workplace, what the person makes or does
JOBS = """
baker oven bakery bread
farmer plough farm wheat
teacher chalk school lessons
miller millstone mill flour
sailor anchor harbour voyages
priest prayer church sermons
hunter bow forest traps
actor mask theatre plays
smith anvil village swords
groom saddle stable rides
clerk stamp station tickets
guard spear castle patrols
cook kettle kitchen soup
gardener spade garden roses
trader scales market deals
miner pick cave coal
fisher net lagoon nets
writer pen library novels
mason chisel tower walls
brewer barrel cellar beer
shepherd staff meadow cheese
painter brush attic portraits
dairyman churn barn butter
ferryman oar ferry crossings
"""

MEALS = _listed("""
soup bread cheese rice fish cake stew pie eggs salad noodles porridge
""")

# comparative, superlative, opposite superlative
SCALES = """
taller tallest shortest
older oldest youngest
faster fastest slowest
richer richest poorest
stronger strongest weakest
happier happiest saddest
"""

DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}


def rows(table: str) -> list[list[str]]:
    """Split a table of this module into rows of words."""
    return [line.split() for line in table.strip().splitlines()]
