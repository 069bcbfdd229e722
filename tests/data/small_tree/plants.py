"Plants, the room they take and the water they want"
from dataclasses import dataclass


@dataclass(frozen=True)
class Plant:
    "One kind of plant"
    name: str
    spacing: float  # Metres to its neighbour
    thirst: float = 0.4  # Share of water in the soil below which it wilts
    days: int = 60  # From seed to harvest


def harvest_day(plant, sown):
    "Day of the year on which a plant sown on day `sown` is ripe"
    return (sown + plant.days - 1) % 365 + 1


def by_thirst(plants):
    "Plants sorted from the thirstiest to the most patient"
    return sorted(plants, key=lambda plant: plant.thirst, reverse=True)


def find_plant(plants, name):
    "The plant called `name`; KeyError if there is none"
    for plant in plants:
        if plant.name == name:
            return plant
    raise KeyError(name)
