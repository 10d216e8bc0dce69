"""The embedded world: scenes of OpenMoji sprites of which everything true is known, for every task.

`writer.write_emoji_scenes` writes shards, `kinds` lists what a sample can be. Its steps serve tasks that need
scenes of their own: `scene.draw_scene`, `phrasing.references`, `rendering.render`.
"""
