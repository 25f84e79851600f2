"""The words that needles and word lists are made of, written for this project: the same on every machine."""

from collections.abc import Callable, Iterable

_ADJECTIVES = """
able amber ample ancient arctic average awake bare bold brave brief bright brisk broad bronze busy calm careful cheap
clever close cold common cool cosmic crisp curious daily damp dark deep dense direct distant double dry dusty early
eager east easy elder empty equal even exact faint fair famous fast fine firm flat fluent fond formal free fresh
friendly full gentle giant glad golden grand grave great green happy hard hasty heavy hidden hollow honest huge humble
icy ideal idle inner jolly keen kind large late lazy lean light little lively local lone long loud loyal lucky lunar
major marine mellow merry mild minor misty modern modest narrow native neat noble north odd old open outer pale plain
polite proud pure quick quiet rapid rare ready real red rich ripe robust round royal rural safe sandy sharp short shy
silent silver simple slim slow smart smooth snowy soft solar solid sour south spare steady steep stern still strange
strict strong sturdy subtle sudden sunny sweet swift tall tame tender thick thin tidy tiny tired total tough true
usual vague vast vivid warm wary weary west white whole wide wild wise wooden young zesty
"""
_NOUNS = """
acorn actor airport album alley anchor angle ankle apple apron arch arrow atlas attic author autumn badge bakery
balcony ballad banner barn barrel basin basket beach beacon beam bell bench berry bicycle blanket blossom boat bonfire
book border bottle boulder bowl branch bread breeze brick bridge broom brush bucket buckle butter button cabin cable
cactus camel camera candle canoe canvas canyon captain carpet carriage castle cattle cave cedar cellar century chain
chair chalk chapel chart cheese cherry chess chest chimney circle citizen clay cliff clock cloud clover coast cobbler
coin collar comet compass copper coral corner cotton cottage cousin cradle crane crayon cricket crown crystal cupboard
curtain cushion dancer dawn deck deer desert desk dial diamond diary dinner dolphin donkey door dragon drawer dream
drum eagle easel echo editor elbow engine envelope evening fabric falcon farmer feather fence ferry fiddle field
finger flag flame flask flower flute forest fork fossil fountain fox frame freight frost fruit furnace galaxy garden
garlic gate giraffe glacier glass glove goat grain granite grape grass gravel guitar hammer hammock harbor harvest hat
hawk hedge helmet herb heron hill hinge honey horizon horse hotel hour house iron island ivory jacket jar jewel
journal journey judge jungle kettle kitchen kite knight ladder lagoon lake lantern laundry lawyer leaf leather lemon
letter library lighthouse lily lime linen lion lizard lobster locket lumber magnet maple marble market mason meadow
medal melon merchant meteor mill mineral mirror mitten monarch monkey moon morning mountain museum music napkin needle
nephew nest nickel night noodle notebook novel nurse oak oasis ocean olive onion orange orbit orchard organ otter oven
owl oyster paddle painter palace panda paper parade parcel parrot pasture path peach peanut pearl pebble pencil pepper
piano picnic pigeon pillow pilot pine planet plank plate plaza pocket poem pond poplar porch potato prairie printer
puddle pumpkin puppet puzzle quarry quilt rabbit radio raft rainbow ranch raven recipe reef ribbon rice river road
robin rocket roof rope rose saddle sailor salad salmon sand sandal scarf school season shadow shell shepherd shield
ship shore shovel signal silk singer sister sketch sleigh snail soap sock spider spoon spring square squirrel stable
stair star station statue steam stone storm stove street student summer sunset swan sweater table tailor teacher
temple tent theater thimble thread throne thunder ticket tiger timber tomato torch tower tractor trail train travel
tree trumpet tulip tunnel turtle uncle valley vase velvet village vine violin visitor voyage wagon walnut water wave
weaver whale wheat wheel whistle willow window winter wolf wool worker yacht yard
"""

ADJECTIVES = tuple(_ADJECTIVES.split())
"""Words that a key begins with."""
NOUNS = tuple(_NOUNS.split())
"""Words that a key ends with."""


def draw_different(number: int, draw: Callable[[], str], beginning: Iterable[str] = ()) -> list[str]:
    """Draw strings until ``number`` of them differ, those of ``beginning`` included, which come first."""
    found = dict.fromkeys(beginning)
    while len(found) < number:
        found[draw()] = None
    return list(found)
