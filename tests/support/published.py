"""Values of the published configurations, with file and line, in the units and under the names of our settings."""

import math

import numpy as np
from schedules import Recipe, Row, of_7b, of_v1, rising, v2

# --- DINOv3: preset "dinov3" -------------------------------------------------------------------------------------

V1_FORM = {"learning_rate": 1e-4, "prototypes": 1e-4, "weight_decay": 1e-4, "ema_momentum": 1e-4,
           "teacher_temperature": 1e-4}  # fmt: skip
HEADS_AS_THEY_ARE = {
    "unit_prototypes": (False, "dinov3/layers/dino_head.py: no norm of the last layer"),
    "standardise": (False, "dinov3/train/ssl_meta_arch.py: the heads see the tokens"),
    "head_lr": (1.0, "dinov3/train/param_groups.py: heads have no factor"),
    "student_temperature": (0.1, "dinov3/loss/dino_clstoken_loss.py, ibot_patch_loss.py"),
}
WHOLE_BACKBONE = {
    "freeze_share": (0.0, "dinov3/train/train.py: all learn from the first step"),
    "ramp_share": (0.0, "likewise"),
    "tune": ("full", "likewise"),
    "drop_path_grows": (False, "dinov3/layers/block.py: one share for all blocks"),
    "sigreg_weight": (0.0, "no such term"),
    "feature_weight": (0.0, "no such term"),
    "relation_weight": (0.0, "no such term"),
    "distortions": (True, "dinov3/data/augmentations.py"),
    "blur": (True, "likewise: 0, 0.9 and 0.5 in effect"),
    "from_scratch": (True, "no weights are named"),
}
DINOV3 = Recipe(
    "dinov3",
    "facebookresearch/dinov3 at 0f84b8b, configs/ssl_default_config.yaml",
    HEADS_AS_THEY_ARE
    | WHOLE_BACKBONE
    | {
        "model": ("vitl16", "85, 86"),
        "steps": (100 * 1250, "130, 71"),
        "batch_size": (64 * 32, "64; README: 32 GPUs"),
        "global_px": (224, "156"),
        "local_px": (96, "157"),
        "num_local": (8, "152"),
        "gram_px": (0, "159"),
        "sizes": ((), "158"),
        "global_scale": ((0.32, 1.0), "149-151"),
        "local_scale": ((0.05, 0.32), "153-155"),
        "flip": (0.5, "162"),
        "mask_share": (0.5, "32"),
        "mask_ratio": ((0.1, 0.5), "33-35"),
        "dino_weight": (1.0, "10"),
        "local_weight": (1.0, "24"),
        "ibot_weight": (1.0, "31"),
        "koleo_weight": (0.1, "17"),
        "spread_group": (64, "18, 64: the batch of a GPU"),
        "gram": ("off", "45"),
        "dino_prototypes": (65_536, "12"),
        "ibot_prototypes": (65_536, "38, 39"),
        "head_hidden": (2048, "16"),
        "head_bottleneck": (256, "13"),
        "ibot_hidden": (2048, "43"),
        "ibot_bottleneck": (256, "40"),
        "centring": ("sinkhorn", "76"),
        "teacher_temperature_start": (0.04, "116"),
        "teacher_temperature": (0.07, "117"),
        "teacher_temperature_share": (30 / 100, "118"),
        "freeze_prototypes_share": (1 / 100, "139"),
        "drop_path": (0.3, "87"),
        "local_cls_norm": (False, "100"),
        "rope_rescale": (1.0, "109"),
        "lr_at_1024": (4 * 1e-3, "134, 140"),
        "lr_end_share": (1e-6 / (4e-3 * math.sqrt(2)), "136"),
        "warmup_share": (10 / 100, "135"),
        "warmup": ("line", "train/train.py (build_schedulers)"),
        "weight_decay": (0.04, "132"),
        "weight_decay_end": (0.4, "133"),
        "betas": ((0.9, 0.999), "146, 147"),
        "clip": (3.0, "138"),
        "layer_decay": (0.9, "143"),
        "patch_lr": (0.2, "141"),
        "ema_momentum": (0.992, "114"),
        "ema_momentum_end": (1.0, "115"),
    },
    {
        "embed_dim": (1024, "85"), "depth": (24, "85"), "num_heads": (16, "85"), "ffn_dim": (4096, "85, 91"),
        "patch_size": (16, "86"), "num_registers": (0, "97"), "position_grid": (None, "102"), "qkv_bias": (True, "93"),
        "key_bias": (True, "98"), "layerscale": (True, "88"), "norm_eps": (1e-6, "96"), "rope_base": (100.0, "103"),
    },
    {"precision": "7, 110", "schedules": "train/train.py (build_schedulers)"},
    lambda: of_v1(4e-3 * math.sqrt(2), 1e-6, 0.992, 1250),
    tolerance=V1_FORM,
)  # fmt: skip

# --- DINOv3: the stages of the 7B --------------------------------------------------------------------------------


def lines(of: dict[str, Row], **others: str) -> dict[str, Row]:
    """The same values with other line numbers."""
    return {name: (of[name][0], where) for name, where in others.items()}


PRETRAIN = Recipe(
    "dinov3_pretrain",
    "facebookresearch/dinov3 at 98b38de, configs/train/dinov3_vit7b16_pretrain.yaml",
    HEADS_AS_THEY_ARE
    | WHOLE_BACKBONE
    | lines(DINOV3.settings, num_local="130", global_scale="127-129", local_scale="131-133", mask_share="25",
            mask_ratio="26-28", dino_weight="10", ibot_weight="24", koleo_weight="17", gram="38", centring="52",
            patch_lr="119", sizes="134", gram_px="38")
    | {
        "model": ("dinov3_vit7b16", "62, 63"),
        "steps": (1000 * 1000, "108, 46"),
        "batch_size": (16 * 256, "41; paper, section 3.2: 256 GPUs"),
        "global_px": (256, "134"),
        "local_px": (112, "135"),
        "flip": (0.0, "138"),
        "local_weight": (1.0, "no reweight_dino_local_loss"),
        "spread_group": (16, "18, 41: the batch of a GPU"),
        "dino_prototypes": (262_144, "12"),
        "ibot_prototypes": (98_304, "31, 32"),
        "head_hidden": (8192, "16"),
        "head_bottleneck": (512, "13"),
        "ibot_hidden": (4096, "36"),
        "ibot_bottleneck": (384, "33"),
        "teacher_temperature_start": (0.04, "164"),
        "teacher_temperature": (0.07, "165"),
        "teacher_temperature_share": (100 / 1000, "167"),
        "freeze_prototypes_share": (5 / 1000, "157"),
        "drop_path": (0.4, "64"),
        "local_cls_norm": (True, "77"),
        "rope_rescale": (2.0, "87"),
        "lr_at_1024": (4 * 5e-5, "154, 118"),
        "lr_end_share": (1.0, "155"),
        "warmup_share": (100 / 1000, "156"),
        "warmup": ("line", "train/train.py (build_schedulers_v2)"),
        "weight_decay": (0.04, "160"),
        "weight_decay_end": (0.04, "161"),
        "betas": ((0.9, 0.99), "124, 125"),
        "clip": (30.0, "116"),
        "layer_decay": (0.98, "121"),
        "ema_momentum": (0.994, "170"),
        "ema_momentum_end": (0.994, "171"),
    },
    {
        "embed_dim": (4096, "62"), "depth": (40, "62"), "num_heads": (32, "62"), "ffn_dim": (8192, "62, 68, 69"),
        "gated": (True, "68"), "patch_size": (16, "63"), "num_registers": (4, "75"), "position_grid": (None, "80"),
        "qkv_bias": (False, "71"), "layerscale": (True, "65"), "norm_eps": (1e-5, "74"), "rope_base": (100.0, "81"),
    },
    {"precision": "7, 88-90"},
    lambda: of_7b(4e-4, 0.994, 0, 1_000_000),
)  # fmt: skip

GRAM = Recipe(
    "dinov3_gram",
    "facebookresearch/dinov3 at 0f84b8b, configs/train/dinov3_vit7b16_gram_anchor.yaml",
    HEADS_AS_THEY_ARE
    | WHOLE_BACKBONE
    | lines(PRETRAIN.settings, model="91, 92", batch_size="70", global_px="163", local_px="164", num_local="159",
            global_scale="156-158", local_scale="160-162", flip="168", mask_share="33", mask_ratio="34-36",
            dino_weight="10", ibot_weight="32", koleo_weight="17", spread_group="18, 70", dino_prototypes="12",
            ibot_prototypes="39, 40", head_hidden="16", head_bottleneck="13", ibot_hidden="44", ibot_bottleneck="41",
            centring="81", teacher_temperature="196", drop_path="93", local_cls_norm="106", rope_rescale="116",
            lr_end_share="186", warmup="train/train.py (build_schedulers_v2)", weight_decay="191",
            weight_decay_end="192", betas="153, 154", clip="145", layer_decay="150", patch_lr="148", sizes="163")
    | {
        "from_scratch": (False, "46: goes on at step 1,000,000"),
        "steps": ((1200 - 1000) * 1000, "137, 64-68"),
        "gram_px": (512, "165"),
        "local_weight": (1.0, "26, 27"),
        "gram_local_weight": (0.5, "28"),
        "gram": ("renew", "49, 52"),
        "gram_weight": (2.0, "66"),
        "gram_begin_share": (0.0, "67: at step 1,000,000"),
        "gram_ramp_share": (1 / 200, "68"),
        "gram_renew_steps": (10_000, "53"),
        "gram_renewals": (3, "55"),
        "gram_of": ("patches", "56, 57; loss/gram_loss.py"),
        "teacher_temperature_start": (0.07, "196: warm since step 100,000"),
        "teacher_temperature_share": (0.0, "198: likewise"),
        "freeze_prototypes_share": (0.0, "188: held until step 5,000"),
        "lr_at_1024": (4 * 3e-5, "185, 147"),
        "warmup_share": (0.0, "187: whole since step 100,000"),
        "ema_momentum": (0.999, "201"),
        "ema_momentum_end": (0.999, "202"),
    },
    {
        "embed_dim": (4096, "91"), "depth": (40, "91"), "num_heads": (32, "91"), "ffn_dim": (8192, "91, 97, 98"),
        "gated": (True, "97"), "patch_size": (16, "92"), "num_registers": (4, "104"), "position_grid": (None, "109"),
        "qkv_bias": (False, "100"), "layerscale": (True, "94"), "norm_eps": (1e-5, "103"), "rope_base": (100.0, "110"),
    },
    {"precision": "7, 117-119", "first gram teacher": "50", "gram crops": "data/augmentations.py", "local norm": "106"},
    lambda: of_7b(2.4e-4, 0.999, 1_000_000, 1_200_000)
    | {
        "gram_weight": v2(0.0, 0.0, 2.0, 1_000_000, 1_200_000, 1000)[1_000_000:],
        "local_weight": v2(1.0, 1.0, 0.5, 1_000_000, 1_200_000, 1000)[1_000_000:],
        "renewals": np.array([10_000, 20_000, 30_000]),  # 53-55, from it_first_update on: train/train.py
    },
    equal_from=11_000,
)  # fmt: skip

HIGH_RESOLUTION = Recipe(
    "dinov3_high_resolution",
    "facebookresearch/dinov3 at 0f84b8b, configs/train/dinov3_vit7b16_high_res_adapt.yaml",
    HEADS_AS_THEY_ARE
    | WHOLE_BACKBONE
    | lines(GRAM.settings, model="90, 91", num_local="158", global_scale="155-157", local_scale="159-161", flip="188",
            mask_share="33", mask_ratio="34-36", dino_weight="10", ibot_weight="32", koleo_weight="17",
            dino_prototypes="12", ibot_prototypes="39, 40", head_hidden="16", head_bottleneck="13", ibot_hidden="44",
            ibot_bottleneck="41", centring="80", teacher_temperature="217", teacher_temperature_start="216",
            teacher_temperature_share="219", freeze_prototypes_share="208", drop_path="92", local_cls_norm="105",
            rope_rescale="115", weight_decay="212", weight_decay_end="213", betas="152, 153", clip="144",
            layer_decay="149", patch_lr="147", ema_momentum="222", ema_momentum_end="223", gram_of="55, 56")
    | {
        "from_scratch": (False, "46: goes on from weights"),
        "steps": (30 * 1000, "136, 74"),
        "batch_size": (8 * 256, "69; paper, section 5.1"),
        "sizes": (("512/112/768:0.3", "768/112/1152:0.3", "768/168/1152:0.3", "768/224/1152:0.05",
                   "768/336/1152:0.05"), "162-185"),
        "spread_group": (16, "18, 21"),
        "local_weight": (0.5, "25-27"),
        "gram": ("start", "49, 51"),
        "gram_weight": (1.5, "63-65"),
        "gram_local_weight": (1.0, "25-27: constant"),
        "gram_begin_share": (0.0, "66"),
        "gram_ramp_share": (0.0, "67"),
        "gram_renewals": (0, "51"),
        "lr_at_1024": (4 * 1.25e-5, "206, 146"),
        "lr_end_share": (1.0, "206"),
        "warmup": ("cosine", "204-206, 209"),
        "warmup_share": (10 / 30, "209"),
    },
    {
        "embed_dim": (4096, "90"), "depth": (40, "90"), "num_heads": (32, "90"), "ffn_dim": (8192, "90, 96, 97"),
        "gated": (True, "96"), "patch_size": (16, "91"), "num_registers": (4, "103"), "position_grid": (None, "108"),
        "qkv_bias": (False, "99"), "layerscale": (True, "93"), "norm_eps": (1e-5, "102"), "rope_base": (100.0, "109"),
    },
    {"precision": "7, 116-118", "gram crops": "data/augmentations.py", "local norm": "105"},
    lambda: {
        "learning_rate": (rise := v2(0.0, 0.0, 5e-5 * math.sqrt(2), 0, 30_000, 10_000)),
        "prototypes": rise,
        "weight_decay": np.full(30_000, 0.04),
        "ema_momentum": np.full(30_000, 0.999),
        "teacher_temperature": np.full(30_000, 0.07),
        "gram_weight": np.full(30_000, 1.5),
        "local_weight": np.full(30_000, 0.5),
    },
    equal_from=4000,
)  # fmt: skip

# --- DINOv2 and DINO ---------------------------------------------------------------------------------------------

DINOV2 = Recipe(
    "dinov2",
    "facebookresearch/dinov2 at fc49f49, configs/ssl_default_config.yaml, of which train/vitl16_short.yaml keeps all",
    WHOLE_BACKBONE
    | lines(DINOV3.settings, steps="90, 68", num_local="108", global_scale="105-107", local_scale="109-111",
            global_px="112", mask_share="52", mask_ratio="53-55", dino_weight="44", ibot_weight="51", koleo_weight="49",
            spread_group="62: the batch of a GPU", dino_prototypes="45", head_hidden="48", head_bottleneck="46",
            teacher_temperature_start="86", teacher_temperature="87", teacher_temperature_share="88",
            freeze_prototypes_share="98", drop_path="74, 76", weight_decay="91", weight_decay_end="92",
            betas="102, 103", clip="97", layer_decay="101", patch_lr="100",
            ema_momentum="84", ema_momentum_end="85", warmup_share="95",
            warmup="utils/utils.py (CosineScheduler)", lr_end_share="96")
    | lines(HEADS_AS_THEY_ARE, unit_prototypes="layers/dino_head.py: lengths are free",
            standardise="train/ssl_meta_arch.py", head_lr="utils/param_groups.py",
            student_temperature="loss/dino_clstoken_loss.py")
    | {
        "model": ("dinov2_vitl14", "72"),
        "batch_size": (64 * 32, "62; README: 4 nodes of 8 GPUs"),
        "local_px": (96, "113"),
        "flip": (0.5, "data/augmentations.py"),
        "local_weight": (1.0, "train/ssl_meta_arch.py"),
        "gram": ("off", "no such term"),
        "gram_px": (0, "no such term"),
        "sizes": ((), "112, 113"),
        "ibot_prototypes": (0, "56: one head"),
        "centring": ("centre", "70"),
        "local_cls_norm": (False, "no such norm"),
        "rope_rescale": (1.0, "no RoPE"),
        "lr_at_1024": (4e-3, "93, 99: utils/config.py, without a factor"),
    },
    {
        "embed_dim": (1024, "72"), "depth": (24, "72"), "num_heads": (16, "72"), "ffn_dim": (4096, "72"),
        "patch_size": (16, "73"), "num_registers": (0, "models/vision_transformer.py"),
        "position_grid": (14, "112, 73"), "qkv_bias": (True, "80"), "key_bias": (True, "80"),
        "layerscale": (True, "75"), "norm_eps": (1e-6, "models/vision_transformer.py"),
    },
    {"precision": "4-42", "prototypes": "layers/dino_head.py", "schedules": "utils/utils.py (CosineScheduler)"},
    lambda: of_v1(4e-3 * math.sqrt(2), 1e-6, 0.992, 1250),
    tolerance=V1_FORM,
)  # fmt: skip

ARGUMENTS = "README, arguments of ViT-S/16"
DINO = Recipe(
    "dino_v1",
    "facebookresearch/dino at 7c446df, main_dino.py",
    WHOLE_BACKBONE
    | lines(DINOV3.settings, dino_weight="no other term", local_weight="likewise", teacher_temperature_start="68",
            head_hidden="vision_transformer.py (DINOHead)", head_bottleneck="likewise", dino_prototypes="55",
            teacher_temperature=ARGUMENTS, teacher_temperature_share=ARGUMENTS, freeze_prototypes_share="93",
            weight_decay="82", weight_decay_end="84", betas="AdamW's own", warmup_share="99", clip="87",
            warmup="utils.py (cosine_scheduler)")
    | lines(HEADS_AS_THEY_ARE, unit_prototypes=f"57; {ARGUMENTS}: norm_last_layer false", standardise="utils.py",
            head_lr="utils.py (get_params_groups)", student_temperature="class DINOLoss")
    | {
        "model": ("dino_vits16", "45, 50"),
        "steps": (100 * 1251, "92; 1,281,167 images"),
        "batch_size": (64 * 16, "90; README: 2 nodes of 8 GPUs"),
        "global_px": (224, "class DataAugmentationDINO"),
        "local_px": (96, "likewise"),
        "flip": (0.5, "likewise"),
        "num_local": (10, ARGUMENTS),
        "global_scale": ((0.25, 1.0), ARGUMENTS),
        "local_scale": ((0.05, 0.25), ARGUMENTS),
        "gram_px": (0, "no such term"),
        "sizes": ((), "class DataAugmentationDINO"),
        "ibot_weight": (0.0, "no such term"),
        "koleo_weight": (0.0, "no such term"),
        "gram": ("off", "no such term"),
        "centring": ("centre", "class DINOLoss"),
        "drop_path": (0.1, "105"),
        "drop_path_grows": (True, "vision_transformer.py: linspace over the blocks"),
        "local_cls_norm": (False, "no such norm"),
        "rope_rescale": (1.0, "no RoPE"),
        "lr_at_1024": (5e-4 * 1024 / 256, "96"),
        "lr_end_share": (1e-5 / 2e-3, ARGUMENTS),
        "layer_decay": (1.0, "utils.py (get_params_groups)"),
        "patch_lr": (1.0, "likewise"),
        "ema_momentum": (0.996, "61"),
        "ema_momentum_end": (1.0, "cosine_scheduler of the momentum"),
    },
    {
        "embed_dim": (384, "vision_transformer.py (vit_small)"), "depth": (12, "likewise"),
        "num_heads": (6, "likewise"), "ffn_dim": (1536, "likewise"), "patch_size": (16, "50"),
        "num_registers": (0, "likewise"), "position_grid": (14, "likewise"),
        "qkv_bias": (True, "likewise"), "key_bias": (True, "likewise"), "layerscale": (False, "likewise"),
        "norm_eps": (1e-6, "likewise"),
    },
    {"clipping": "utils.py (clip_gradients)", "prototypes": "vision_transformer.py (DINOHead)",
     "blur": "class DataAugmentationDINO", "precision": "78",
     "stochastic depth": "vision_transformer.py (drop_path)", "temperature": "class DINOLoss",
     "schedules": "utils.py (cosine_scheduler)"},
    lambda: of_v1(2e-3, 1e-5, 0.996, 1251, rising(0.04, 0.07, 30, 100).repeat(1251)),
    tolerance=V1_FORM | {"teacher_temperature": 0.0011 / 0.07},
)  # fmt: skip

RECIPES = (DINOV3, PRETRAIN, GRAM, HIGH_RESOLUTION, DINOV2, DINO)
