"""The embedded world: scenes of OpenMoji sprites of which everything true is known, for every task.

`writer.write_emoji_scenes` writes tar shards; its table `KINDS` lists what a sample can be. The steps serve
those who need scenes of their own: `scene.draw_scene`, `captions.true_captions`, `rendering.render`.
"""
