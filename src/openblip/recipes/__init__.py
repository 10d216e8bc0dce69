"""Complete trainings as data; `RECIPES` has them by the names that the command line calls them."""

from collections.abc import Callable

from openblip.recipes import blip, blip2, mini
from openblip.recipes.run import Run

RECIPES: dict[str, Callable[[], Run]] = {
    recipe.__name__.rstrip("_").replace("_", "-"): recipe
    for recipe in (
        mini.blip_mini,
        mini.blip_mini_captioner,
        mini.blip_mini_filter,
        mini.blip_mini_vqa,
        mini.blip_mini_nlvr,
        mini.blip_mini_visdial,
        mini.blip_mini_video_retrieval,
        mini.blip_mini_video_qa,
        blip.blip_base,
        blip.blip_large,
        blip.caption,
        blip.caption_large,
        blip.filter_,
        blip.filter_large,
        blip.retrieval_flickr,
        blip.vqa,
        blip.nlvr,
        blip.visdial,
        blip.video_retrieval,
        blip.video_qa,
        mini.blip2_mini_opt,
        mini.blip2_mini_t5,
        blip2.blip2_stage1,
        blip2.blip2_stage1_vit_l,
        blip2.blip2_stage2_opt,
        blip2.blip2_stage2_t5,
        blip2.blip2_caption,
        blip2.blip2_vqa,
        blip2.blip2_retrieval,
        blip2.blip2_instruct,
        mini.blip2_mini_stage1,
        mini.blip2_mini_stage2_opt,
        mini.blip2_mini_stage2_t5,
        mini.blip2_mini_scratch_opt,
        mini.blip2_mini_scratch_t5,
    )
}
