"""Sample text that several tests share."""

ENGLISH = [
    f"The {a} {b} saw {c} {d} near the old bridge, and nobody said a word about it."
    for a in ("miller", "sailor", "baker", "priest")
    for b in ("gladly", "slowly", "never")
    for c in ("seven", "many", "two")
    for d in ("ships", "horses", "letters", "stars")
]
CHINESE = [
    f"{a}的特产是{b}，流经{a}的河是{c}。{a}离县城有一天的路程。"
    for a in ("青岭镇", "白渡镇", "石湾镇", "云桥镇")
    for b in ("蜂蜜", "茶叶", "板栗")
    for c in ("清水河", "白浪河", "金沙溪")
]
