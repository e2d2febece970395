"""What computes: trunks, heads, ways of sharing, and the model made of them."""

from mtl_jax.models.heads import (HEADS, MLP, Detection, FeaturePyramid, Linear, Normalized,
                                  SemanticFPN, Upsampling)
from mtl_jax.models.multi_task_model import MultiTaskModel
from mtl_jax.models.sharing import (CGC, MTAN, NDDR, PLE, SHARINGS, Adapters, AdaShare, CrossStitch,
                                    DSelectK, FiLM, Hard, Independent, LearnedBranching, LoRA, MMoE,
                                    Soft, TaskNorm)
from mtl_jax.models.trunks import CNN, TRUNKS, MLPTrunk, ResNet, Trunk, ViT, resnet18
