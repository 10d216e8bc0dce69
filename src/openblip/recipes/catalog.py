"""The recipes by the names the command line calls them."""

from collections.abc import Callable

from openblip.recipes import (
    blip2_fine_tuning,
    blip2_mini,
    blip2_pretraining,
    blip_fine_tuning,
    blip_mini,
    blip_pretraining,
)
from openblip.recipes.run import Run

RECIPES: dict[str, Callable[[], Run]] = {
    "blip-mini": blip_mini.blip_mini,
    "blip-mini-captioner": blip_mini.blip_mini_captioner,
    "blip-mini-filter": blip_mini.blip_mini_filter,
    "blip-mini-vqa": blip_mini.blip_mini_vqa,
    "blip-mini-nlvr": blip_mini.blip_mini_nlvr,
    "blip-mini-visdial": blip_mini.blip_mini_visdial,
    "blip-mini-video-retrieval": blip_mini.blip_mini_video_retrieval,
    "blip-mini-video-qa": blip_mini.blip_mini_video_qa,
    "blip-base": blip_pretraining.blip_base,
    "blip-large": blip_pretraining.blip_large,
    "caption": blip_fine_tuning.caption,
    "caption-large": blip_fine_tuning.caption_large,
    "filter": blip_fine_tuning.filter_,
    "filter-large": blip_fine_tuning.filter_large,
    "retrieval-flickr": blip_fine_tuning.retrieval_flickr,
    "vqa": blip_fine_tuning.vqa,
    "nlvr": blip_fine_tuning.nlvr,
    "visdial": blip_fine_tuning.visdial,
    "video-retrieval": blip_fine_tuning.video_retrieval,
    "video-qa": blip_fine_tuning.video_qa,
    "blip2-mini-opt": blip2_mini.blip2_mini_opt,
    "blip2-mini-t5": blip2_mini.blip2_mini_t5,
    "blip2-stage1": blip2_pretraining.blip2_stage1,
    "blip2-stage1-vit-l": blip2_pretraining.blip2_stage1_vit_l,
    "blip2-stage2-opt": blip2_pretraining.blip2_stage2_opt,
    "blip2-stage2-t5": blip2_pretraining.blip2_stage2_t5,
    "blip2-caption": blip2_fine_tuning.blip2_caption,
    "blip2-vqa": blip2_fine_tuning.blip2_vqa,
    "blip2-retrieval": blip2_fine_tuning.blip2_retrieval,
    "blip2-instruct": blip2_fine_tuning.blip2_instruct,
    "blip2-mini-stage1": blip2_mini.blip2_mini_stage1,
    "blip2-mini-stage2-opt": blip2_mini.blip2_mini_stage2_opt,
    "blip2-mini-stage2-t5": blip2_mini.blip2_mini_stage2_t5,
    "blip2-mini-scratch-opt": blip2_mini.blip2_mini_scratch_opt,
    "blip2-mini-scratch-t5": blip2_mini.blip2_mini_scratch_t5,
}
