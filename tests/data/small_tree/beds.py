"Beds of a greenhouse and what grows in them"
from dataclasses import dataclass, field

DEFAULT_DEPTH = 30  # Centimetres of soil


@dataclass
class Bed:
    "A rectangular bed of soil"
    width: float  # Metres
    length: float  # Metres
    depth: float = DEFAULT_DEPTH  # Centimetres
    plants: list = field(default_factory=list)  # Plants in order of planting

    def area(self):
        "Area of the bed in square metres"
        return self.width * self.length

    def volume(self):
        "Volume of the soil in litres"
        return self.area() * self.depth * 10

    def plant(self, plant, count=1):
        "Put `count` copies of a plant into the bed"
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.plants += [plant] * count
        return self


def fits(bed, plant):
    "Whether one more plant has the room that it needs"
    taken = sum(p.spacing ** 2 for p in bed.plants)
    return taken + plant.spacing ** 2 <= bed.area()


def rotate(beds):
    "The beds with their plants moved one bed further, as each year asks for"
    plants = [bed.plants for bed in beds]
    for bed, moved in zip(beds, plants[-1:] + plants[:-1]):
        bed.plants = moved
    return beds
