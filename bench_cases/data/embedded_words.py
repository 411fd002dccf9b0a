"""Word lists and sentence templates of the embedded corpus. Data only, in a fixed order.

Slots in templates: ``T`` a term of one of the document's labels, ``D`` the name of its domain or sector, ``N`` a number, ``Y``
a year, ``M`` a month; in web sentences ``T`` a noun of the page's theme, ``A`` an adjective, ``V`` a verb, ``W`` a name, ``P``
a place. Every other word stands for itself. Any edit here changes the generated corpus: raise ``embedded.VERSION`` with it.
"""

# One domain a line; the terms are its labels, the most used one first.
DOMAINS: dict[str, str] = {
    "agriculture": "cereals sugar wheat maize barley rice olives tobacco potatoes seeds hops rapeseed soya fodder flax cotton "
    "sowing harvest fertiliser ploughing irrigation orchards nurseries mushrooms chicory lentils sorghum buckwheat",
    "trade": "imports tariffs quotas dumping origin customs exports licences surcharge duties countervailing preferences "
    "embargo transit warehouses consignment invoices brokers samples reshipment drawback barter franchise auction catalogue "
    "haulage consignee demurrage",
    "fisheries": "cod vessels herring trawlers mackerel nets haddock tuna sardines catches hake plaice sole shrimp lobster "
    "anchovy whiting pollack squid mussels oysters halibut eel sprat swordfish scallops turbot cuttlefish",
    "veterinary": "cattle swine poultry vaccines sheep goats abattoirs rabies brucellosis carcases horses eggs embryos semen "
    "foot-and-mouth tuberculosis quarantine rabbits bees parasites ostriches deer salmonella dourine glanders scrapie anthrax "
    "ringworm",
    "transport": "roads lorries railways airports tachograph drivers freight tunnels pilots wagons containers ferries bridges "
    "tyres motorways bicycles trams pipelines barges locks canals harbours helicopters beacons pontoons gauges sidings "
    "funiculars",
    "environment": "waste emissions habitats ozone wetlands recycling effluent packaging sludge asbestos landfill mercury "
    "birds forests erosion solvents batteries incinerators biodiversity noise dioxins drought lakes glaciers peatland lichens "
    "badgers otters",
    "finance": "banks budget credit loans accounts auditors securities insurance pensions bonds deposits currency mortgages "
    "interest coinage shareholders liquidity treasury leasing annuities bankruptcy cheques dividends arrears brokerage "
    "counterfeiting usury escrow",
    "health": "medicines labelling additives patients hospitals pesticides residues allergens blood cosmetics sweeteners "
    "vitamins nurses infants hygiene toxicology pharmacists implants prostheses ageing diabetes malaria hearing spectacles "
    "dentists midwives organs placebo",
    "employment": "workers wages training unions migrants retirement apprentices dismissal unemployment equality holidays "
    "overtime accidents maternity miners seafarers redundancy childcare disability strikes teleworking internships piecework "
    "nightwork artisans caretakers porters sextons",
    "energy": "coal steel gas uranium petroleum turbines electricity reactors isotopes refineries boilers solar biomass coke "
    "briquettes grids dams insulation lignite hydrogen dynamos peat windmills kerosene propane geothermal ethanol fusion",
    "culture": "films schools museums students broadcasting languages libraries theatre heritage universities authors music "
    "sport archives tourism youth teachers castles festivals dictionaries opera sculpture cathedrals folklore puppets mosaics "
    "archery chess",
    "technology": "telecommunications satellites software patents frequencies standards encryption lasers semiconductors "
    "robots data antennas cables lifts toys machinery mirrors computers modems sensors printers calibration ceramics polymers "
    "holograms abacus telegraphs looms",
}

# General labels above the domains. One stands on three documents in five: a label that is more often
# there than not is what a threshold of one half shows within a few dozen steps.
SECTORS: dict[str, tuple[str, ...]] = {
    "goods": ("agriculture", "trade", "fisheries", "veterinary", "transport"),
    "people": ("health", "employment", "culture"),
}

# Dense in terms, so that a title and a few sentences (128 tokens) tell a document's labels.
LAW_HEADS = (
    "COMMISSION REGULATION No N of Y on D concerning T T and T",
    "COUNCIL DECISION of N M Y on D : T T and T",
    "COUNCIL DIRECTIVE Y on D relating to T and T",
    "COMMISSION DECISION Y on D amending D Decision N as regards T and T",
    "COMMISSION REGULATION No N Y on D fixing the D amounts for T and T",
)
LAW_PREAMBLES = (
    "\nTHE COMMISSION , having regard to the D Treaty and to the rules on D T ,",
    "\nTHE COUNCIL , having regard to the common D policy on T ,",
    "\nHaving regard to D Regulation No N on D T ,",
)
LAW_SENTENCES = (
    "\nWhereas D T and D T should be covered by the same D provisions ;",
    "\nWhereas Member States must notify all D measures taken for D T ;",
    "\nWhereas D Regulation N on T and T lays down D rules for T ;",
    "\nWhereas it is necessary to amend the D Annex with respect to T and T ;",
    "\nWhereas the D situation of D T has changed ;",
    "\nAnnex : D T , D T , D T , D T .",
    "\nArticle N : D T and D T . D T . T T T .",
    "\nThe list of D T and D T is hereby replaced by the list of T and T .",
    "\nThe D authorities shall ensure that D T comply with the D conditions .",
    "\nThis D Regulation shall apply to T and to T from Y .",
    "\nFor the purposes of this D Article T shall be treated in the same way as D T .",
    "\nThe provisions on D shall not apply to T and T .",
    "\nThe Committee for D has delivered an opinion on D T and D T .",
    "\nIn the interests of D the D rules on T should be consolidated .",
    "\nThe quantity of D T shall not exceed N tonnes of T and N tonnes of T .",
    "\nMember States shall communicate to the D Committee the D data on T each M .",
    "\nD certificates for D T shall be drawn up in one official language of the Community .",
    "\nHowever , D derogations may be granted for T and T until N M Y .",
    "\nThe D measures are in accordance with the opinion of the D Committee on T .",
    "\nWhere D T or D T are found not to comply , the Member State shall take D steps without delay .",
    "\nThis Regulation shall be binding in its entirety and directly applicable in all Member States .",
    "\nDone at Brussels , N M Y .",
)

MONTHS = "January February March April May June July August September October November December"

WEB_THEMES: dict[str, str] = {
    "phones": "phone screen battery camera app charger keyboard update signal wallet",
    "football": "team coach season goal match player striker league fans stadium",
    "cooking": "recipe oven sauce garlic bread soup kitchen butter onion dinner",
    "politics": "senator vote election budget bill campaign governor poll party speech",
    "travel": "hotel flight beach ticket island train museum passport suitcase street",
    "games": "console level quest boss sword patch server guild map controller",
    "science": "planet rocket lab study cell telescope vaccine theory signal climate",
    "music": "album song guitar band drummer tour chorus singer vinyl concert",
    "money": "stock bank investor profit startup price salary market tax loan",
    "home": "garden roof dog sofa window neighbour lamp fence cat bedroom",
}
WEB_ADJECTIVES = (
    "new old good great small big strange cheap quiet early local famous broken simple long short popular "
    "difficult free real bright heavy clean rare serious"
)
WEB_VERBS = (
    "likes needs found wants bought lost watched fixed made sold kept showed used changed loved missed tested opened "
    "ignored shared"
)
WEB_NAMES = "Anna James Maria David Sarah Tom Julia Peter Laura Mike Sofia Daniel Emma Chris Nina Robert"
WEB_PLACES = "London Chicago Berlin Paris Toronto Sydney Boston Madrid Austin Dublin Tokyo Oslo Denver Rome Seattle Leeds"
WEB_SENTENCES = (
    "The T is A and the T is A .",
    "W V the A T in P .",
    "It is not easy to find a A T these days .",
    "According to W , the T was A last year .",
    "I have been looking for a T like this for a long time .",
    '" We think the T will be A , " said W .',
    "There are N ways to use a T .",
    "\n\nIn P , the T has become very A .",
    "You can read more about the T on our site .",
    "What do you think about the T ? Let us know in the comments below .",
    "W V a T and W V the T .",
    "In Y , the T in P V everyone .",
    "The A T was one of the best of the year .",
    "But the T is still more A than the T .",
    "If you want a A T , you need a A T .",
    "\n\nThis is why W V the T so much .",
    "One of the things that people forget is that the T can be A .",
    "He said that the T would cost $ N a year .",
    "She told us that she would never go back to P without a T .",
    "\n\nImage caption : W with the T in P .",
    "All of the A T in the world could not help W .",
    "The first T was A , the second T was A .",
)
