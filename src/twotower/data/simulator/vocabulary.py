"""Define the vocabulary of the simulated town: categories, names, and sentences of reviews.

All words are safe inside a JSON string, or already escaped.
"""

from __future__ import annotations

from dataclasses import dataclass

# parent | rhythm of the week | usual price (0 = none) | weight | leaf: words of its reviews; …
TAXONOMY = """
Restaurants|meal|1|6|Mexican: tacos, salsa, guacamole, burritos; Pizza: crust, pepperoni, slices, calzone
Restaurants|meal|1|6|Burgers: burger, fries, milkshake, onion rings
Restaurants|meal|1|5|Sandwiches: hoagie, cheesesteak, panini, pickles; Fast Food: drive-thru, nuggets, combo, fries
Restaurants|meal|1|5|Chicken Wings: wings, blue cheese, hot sauce, celery
Restaurants|meal|2|6|Italian: pasta, lasagna, tiramisu, gnocchi; American (Traditional): meatloaf, pot roast, steak fries, gravy
Restaurants|meal|2|6|American (New): tasting menu, aioli, short rib, greens
Restaurants|meal|2|5|Chinese: dumplings, lo mein, dim sum, fried rice; Japanese: ramen, tempura, udon, gyoza
Restaurants|meal|2|5|Thai: pad thai, green curry, basil, satay
Restaurants|meal|2|3|Indian: naan, tikka masala, biryani, samosas; Vietnamese: pho, banh mi, spring rolls, vermicelli
Restaurants|meal|2|3|Korean: bibimbap, kimchi, bulgogi, banchan
Restaurants|meal|2|3|Mediterranean: hummus, falafel, gyro, tabbouleh; Greek: souvlaki, feta, pita, baklava
Restaurants|meal|2|3|Barbeque: brisket, ribs, pulled pork, cornbread
Restaurants|meal|3|3|Seafood: oysters, crab cakes, lobster, clams; Sushi Bars: sashimi, nigiri, omakase, spicy tuna roll
Restaurants|meal|3|3|Steakhouses: ribeye, filet, creamed spinach, porterhouse
Restaurants|meal|1|2|Vegan: tofu, jackfruit, cashew cheese, tempeh; Salad: kale, dressing, quinoa, croutons
Restaurants|meal|1|2|Food Trucks: truck, line, street food, window; Soup: chowder, broth, bisque, crackers
Restaurants|meal|3|1|French: croissant, duck confit, escargot, brie; Tapas Bars: patatas bravas, jamon, sangria, olives
Restaurants|meal|3|1|Cajun/Creole: gumbo, jambalaya, beignets, crawfish
Restaurants|morning|1|5|Breakfast & Brunch: pancakes, omelette, eggs benedict, mimosas
Restaurants|morning|1|5|Diners: hash browns, bottomless coffee, waffles, patty melt; Cafes: latte, scone, quiche, avocado toast
Food|morning|1|4|Coffee & Tea: espresso, cold brew, cappuccino, chai; Bakeries: sourdough, cupcakes, pastries, baguette
Food|morning|1|4|Donuts: glazed donut, apple fritter, crullers, sprinkles; Bagels: lox, schmear, everything bagel, cream cheese
Food|meal|1|3|Ice Cream & Frozen Yogurt: gelato, sundae, toppings, waffle cone
Food|meal|1|3|Desserts: cheesecake, macarons, brownies, creme brulee
Food|meal|1|3|Juice Bars & Smoothies: smoothie, acai bowl, wheatgrass, juice
Food|shop|2|3|Grocery: produce, deli counter, cereal aisle, self checkout; Farmers Market: tomatoes, honey, peaches, local eggs
Food|shop|2|3|Specialty Food: olive oil, spices, charcuterie, truffles
Food|shop|2|3|Beer, Wine & Spirits: bourbon, wine selection, craft beer, tequila
Nightlife|night|2|5|Bars: bartender, drafts, shots, jukebox; Pubs: pint, stout, fish and chips, trivia
Nightlife|night|2|5|Sports Bars: big screens, game day, nachos, pitchers
Nightlife|night|2|5|Cocktail Bars: old fashioned, negroni, bitters, martini
Nightlife|night|2|3|Breweries: IPA, flight, taproom, lager; Wine Bars: pinot, cheese board, cabernet, sommelier
Nightlife|night|2|3|Lounges: hookah, booths, DJ, bottle service; Dive Bars: pool table, cheap beer, darts, regulars
Nightlife|night|2|2|Dance Clubs: dance floor, cover charge, bouncer, DJ; Music Venues: sound system, band, encore, stage
Nightlife|night|2|2|Karaoke: microphone, song list, duet, private room
Arts & Entertainment|weekend|2|2|Museums: exhibit, gallery, audio guide, sculpture; Cinema: popcorn, recliner, previews, matinee
Arts & Entertainment|weekend|2|2|Performing Arts: orchestra, balcony, usher, intermission
Arts & Entertainment|weekend|2|2|Arcades: pinball, tokens, skee ball, prizes
Active Life|weekend|0|2|Parks: trail, playground, picnic tables, ducks; Gyms: treadmill, weights, locker room, trainers
Active Life|weekend|0|2|Yoga: vinyasa, mat, instructor, savasana; Hiking: overlook, trailhead, waterfall, switchbacks
Active Life|weekend|0|2|Bowling: lanes, bowling shoes, strike, gutter
Shopping|shop|2|3|Books, Mags, Music & Video: used books, vinyl, magazines, poetry
Shopping|shop|2|3|Women's Clothing: dresses, fitting room, blouse, heels; Men's Clothing: suits, ties, tailor, jeans
Shopping|shop|2|3|Department Stores: escalator, registers, clearance rack, perfume counter
Shopping|shop|2|2|Thrift Stores: vintage finds, racks, donations, bargains
Shopping|shop|2|2|Furniture Stores: sofa, mattress, delivery crew, recliner; Sporting Goods: running shoes, bikes, tents, kayak
Shopping|shop|2|2|Jewelry: engagement ring, watch battery, necklace, appraisal; Toy Stores: board games, puzzles, trains, plush
Beauty & Spas|service|2|3|Hair Salons: balayage, haircut, stylist, blowout
Beauty & Spas|service|2|3|Nail Salons: manicure, gel polish, pedicure, massage chair
Beauty & Spas|service|2|3|Barbers: fade, hot towel, clippers, beard trim; Day Spas: facial, sauna, robe, massage
Beauty & Spas|service|2|3|Tattoo: ink, linework, sleeve, artist
Health & Medical|service|0|1|Dentists: cleaning, crown, hygienist, x-rays; Doctors: waiting room, nurse, check-up, prescription
Health & Medical|service|0|1|Naturopathic/Holistic: herbs, acupuncture, remedies, consultation
Health & Medical|service|0|1|Optometrists: glasses, eye exam, frames, contacts
Automotive|service|0|2|Auto Repair: brakes, mechanic, estimate, transmission
Automotive|service|0|2|Oil Change Stations: oil change, filter, coupon, lube tech; Car Wash: wax, vacuum, tire shine, rinse
Automotive|service|0|2|Tires: alignment, flat, rotation, tread
Home Services|service|0|1|Plumbing: water heater, leak, drain, pipes; Contractors: remodel, drywall, quote, crew
Home Services|service|0|1|Movers: boxes, truck, piano, movers
Home Services|service|0|1|Heating & Air Conditioning: furnace, thermostat, AC unit, technician
Pets|service|0|2|Veterinarians: puppy shots, vet tech, our cat, exam room; Pet Groomers: nail trim, bath, poodle, doggy haircut
Pets|service|0|2|Pet Stores: kibble, fish tank, leashes, treats
Hotels & Travel|weekend|3|1|Hotels: front desk, pillows, suite, pool; Bed & Breakfast: innkeeper, porch, quilt, garden room
"""

TOWNS = (
    "Saint Alban",
    "Cedar Falls Park",
    "Port Marlow",
    "Ashbourne",
    "Lake Verity",
    "Mill Hollow",
    "New Carrick",
    "Fort Eldridge",
    "Quarry Bay",
    "Saint Odile",
    "West Harrow",
    "Bellmere",
)
TOWN_SUFFIXES = ("", " Heights", " Springs", " Junction", " Beach", " Valley", " Grove", " Landing")
STATES = ("PA", "FL", "MO", "TN", "AZ", "IN", "LA", "NV")
STREETS = (
    "Chapala St",
    "Market St",
    "N Broad St",
    "Ridge Pike",
    "Elm Ave",
    "2nd Ave S",
    "Harbor Blvd",
    "Old Mill Rd",
    "State Route 9",
    "W Gulf Dr",
)
FIRST_NAMES = (
    "Abby", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Liam", "Maya", "Noé", "Olga",
    "Priya", "Quinn", "Rosa", "Sam", "Tara", "Uma", "Víctor", "Wendy", "Xavier", "Yuki", "Zoë",
)  # fmt: skip
ADJECTIVES = (
    "Golden", "Little", "Old", "Blue", "Lucky", "Royal", "Rustic", "Urban", "Happy", "Silver", "Hidden", "Crooked", "Sunny",
    "Twin", "Iron", "Velvet",
)  # fmt: skip
NOUNS = (
    "Lantern", "Fox", "Garden", "Corner", "Harbor", "Oak", "Lotus", "Anchor", "Rooster", "Maple", "Crown", "Bridge", "Sparrow",
    "Mill", "Copper", "Moon",
)  # fmt: skip

OPENINGS = (
    "Been coming here for years. ",
    "First time in. ",
    "Stopped by on a whim. ",
    "A friend told us about this one. ",
    "We had high hopes. ",
    "Where do I start? ",
    "OK so. ",
    "Finally tried it! ",
    "Update to my earlier review:\\n\\n",
    '\\"Best in town\\", they say. ',
    "",
    "Long story short: ",
)
PRAISE = (  # by stars, 1 to 5: before and after the category's word
    (("Terrible ", "."), ("Avoid the ", "!"), ("They got the ", " completely wrong."), ("Worst ", " I have had.")),
    (("Disappointed by the ", "."), ("The ", " could be so much better."), ("Not sold on the ", ".")),
    (("The ", " was okay."), ("Average ", ", nothing more."), ("Decent ", ", I guess.")),
    (("Really liked the ", "."), ("Good ", " here."), ("The ", " is worth the trip.")),
    (("LOVE the ", "!"), ("Best ", " around!"), ("Could not get enough of the ", "."), ("Amazing ", ".")),
)
STYLE = (  # by taste dimension, low and high end
    (
        ("Quiet enough to talk.", "Calm and peaceful.", "Low-key place."),
        ("So loud and lively.", "Packed, music up.", "Big energy in here."),
    ),
    (
        ("Nothing fancy.", "Very casual, come as you are.", "No frills."),
        ("Elegant from door to bill.", "Dress up for it.", "Classy and polished."),
    ),
    (
        ("Old school in the best way.", "Traditional, nothing new.", "Feels like the 70s."),
        ("Very trendy crowd.", "Hip and modern.", "Instagram heaven."),
    ),
    (
        ("Great for kids.", "The whole family fits.", "Stroller friendly."),
        ("Adults only feel.", "Perfect date spot.", "Leave the kids at home."),
    ),
)
PRICE = (
    ("Fair quote.", "They charge what they say."),
    ("Cheap!", "So affordable."),
    ("Reasonable prices.", "Good value."),
    ("A bit pricey.", "Not cheap."),
    ("Very expensive.", "Bring your savings."),
)
CLOSINGS = (
    ("Never again.", "Zero stars if I could.", "Stay away."),
    ("Probably won't return.", "Meh.", "Needs work."),
    ("Might give it another try.", "It's fine.", "3 stars."),
    ("Will be back.", "Recommended.", "Solid spot."),
    ("Five stars!", "Can't wait to return \\u2764", "A gem.", "Go now :)"),
)
TIPS = ("Try the ", "Get the ", "Skip the ", "Ask for the ", "Best time for the ", "Happy about the ")
TIP_ENDS = (".", "!", " - trust me.", " on weekdays.", " before 6.", "!!!")


@dataclass(frozen=True, slots=True)
class Category:
    """A leaf of the taxonomy; `rhythm` names its weekly hours, `words` occur in its reviews."""

    name: str
    parent: str
    rhythm: str
    price: int
    weight: float
    words: tuple[str, ...]


def categories() -> list[Category]:
    """Return the leaves of `TAXONOMY`, sorted by rhythm."""
    leaves = []
    for line in TAXONOMY.strip().splitlines():
        parent, rhythm, price, weight, rest = line.split("|")
        for leaf in rest.split(";"):
            name, words = leaf.split(":")
            leaves.append(
                Category(name.strip(), parent, rhythm, int(price), float(weight), tuple(word.strip() for word in words.split(",")))
            )
    return sorted(leaves, key=lambda leaf: leaf.rhythm)
