"""CelebA: forty attributes of a face as forty tasks, the many-task benchmark.

  python launch.py --config=configs/celeba.py --config.data.streams.faces.path=~/celeba

Liu, Luo, Wang, Tang: Deep Learning Face Attributes in the Wild (ICCV 2015, arXiv:1411.7766). The
setting is that of Sener and Koltun (NeurIPS 2018, arXiv:1810.04650), each attribute a task of two
classes, 64x64 images, and the one that later comparisons of balancers use. Expected on disk are
`img_align_celeba/`, `list_attr_celeba.txt` and `list_eval_partition.txt`.

Arguments, separated by commas after the file name:

  one          all attributes as one task with forty outputs
  resnet18     ResNet-18 in place of the small reference network
  tasks=A[+B]  only these attributes, such as tasks=Smiling+Male

Not measured here: the data is not to be had without a registration.
"""

import ml_collections

ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs",
    "Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows",
    "Chubby", "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair", "Heavy_Makeup",
    "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes", "No_Beard",
    "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns",
    "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat",
    "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie", "Young")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  """The config for an argument string such as "resnet18"."""
  words, attributes = set(), ATTRIBUTES
  for word in filter(None, arg.split(",")):
    if word.startswith("tasks="):
      attributes = tuple(word.removeprefix("tasks=").split("+"))
    elif word in ("one", "resnet18"):
      words.add(word)
    else:
      raise ValueError(f"expected one, resnet18 or tasks=A[+B…], found {word!r}")
  for attribute in attributes:
    if attribute not in ATTRIBUTES or attributes.count(attribute) > 1:
      raise ValueError(f"tasks: expected CelebA's attributes, each once, found {attribute!r}")

  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = {"streams": {"faces": {"name": "celeba", "size": 64}}, "batch_size": 256,
                 "augmentation": ("flip",)}
  if "one" in words:
    config.tasks = {"attributes": {"name": "multilabel", "stream": "faces", "label": "attributes",
                                   "head": {"name": "linear"}}}
  else:
    config.tasks = {attribute: {"name": "classification", "stream": "faces", "label": attribute,
                                "head": {"name": "linear"}} for attribute in attributes}
  config.trunk = {"name": "cnn", "channels": (64, 128, 256), "width": 512}
  if "resnet18" in words:
    config.trunk = {"name": "resnet18", "stem": "imagenet"}
  config.sharing = {"name": "hard"}
  config.balancer = {"name": "equal"}
  config.optimizer = {"name": "adam", "learning_rate": 3e-4}
  config.train = {"epochs": 15.0}
  return config
