"""What the invented authors of `posttrain.data.procedural_authors` are made of."""

MONTHS = "January February March April May June July August September October November December"

# parts of names and titles
PARTS = {
    "start": "Bel Cor Dra Eli Fen Gal Hes Ira Jul Kor Lum Mar Nev Ori Pel Quin Ros Sel Tav Ulm Ver Wil Yar Zan",
    "end": "a an ara din el ena eth ia ien is on or ova us wyn",
    "family": "bridge crest dale ford gard holm lund mere quist rath stad strand thorn vale wick worth",
    "town": "berg burg by dorf field haven mouth pool port stead ton ville",
    "adjective": "Amber Bitter Broken Copper Distant Drowned Empty Faithful Frozen Gentle Golden Hidden Hollow Iron "
    "Last Lonely Lost Midnight Paper Patient Quiet Salt Scarlet Second Silent Silver Sleeping Stolen Tall Velvet "
    "Wandering Winter",
    "noun": "Anchor Bridge Candle Carnival Clock Compass Daughter Door Feather Forest Garden Harbour Island Key Ladder "
    "Lantern Library Lighthouse Map Mirror Mountain Orchard Orchestra Passenger River Shepherd Shore Station Storm "
    "Tower Valley Window",
    "month": MONTHS,
}

# what a question asks for, where one word answers it; `job` stands for both parents
ANSWERS = {
    "job": "baker barber beekeeper blacksmith bookbinder butcher carpenter chemist clockmaker dentist farmer fisherman "
    "florist gardener judge locksmith mason miller nurse painter pilot plumber potter sailor surgeon tailor teacher "
    "weaver",
    "genre": "adventure biography comedy cookery drama fable fantasy history horror memoir mystery poetry romance "
    "satire travel war",
    "subject": "astronomy botany chemistry economics geology law linguistics medicine music philosophy physics",
    "instrument": "accordion bassoon cello clarinet drums flute guitar harp lute oboe piano trumpet viola violin",
    "animal": "canary cat dog donkey falcon ferret goat hedgehog horse magpie parrot pony rabbit raven tortoise",
}

# facts of the world are what follows on what
ORDERS = {
    "letter of the alphabet": "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
    "number": "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty",
    "month": MONTHS,
    "day of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
}
