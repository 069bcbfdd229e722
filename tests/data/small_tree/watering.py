"When to water, and how much"
from beds import Bed

LITRES_PER_CAN = 10


def needs_water(bed: Bed, moisture: float) -> bool:
    "Whether any plant in the bed is thirstier than the soil is moist"
    return any(plant.thirst > moisture for plant in bed.plants)


def litres(bed: Bed, moisture: float, target: float = 0.6) -> float:
    "Litres of water that bring the soil of a bed to `target`"
    return max(target - moisture, 0) * bed.volume()


def cans(bed: Bed, moisture: float) -> int:
    "Full watering cans for one bed"
    return -(-litres(bed, moisture) // LITRES_PER_CAN)


class Schedule:
    "Which bed is watered on which day"

    def __init__(self, every=2):
        self.every = every
        self.days = {}

    def add(self, bed, first=1):
        "Water `bed` from day `first` on"
        self.days[id(bed)] = first

    def due(self, bed, day):
        "Whether a bed is watered on a day"
        return (day - self.days[id(bed)]) % self.every == 0
