"""The words of the generated stories: characters, things and places, with the grammar that a sentence needs.

A character has a pronoun, a thing its measure word, a place its locative (公园 + 里). Tags describe the use of a word: a plot draws from
the words with a certain tag, so that nobody eats a kite.
"""

from __future__ import annotations

from typing import NamedTuple


class Character(NamedTuple):
    name: str
    pronoun: str  # 他 她 它
    kind: str  # child, animal, family, neighbour


class Thing(NamedTuple):
    name: str
    measure: str  # the measure word: 一 + 只 + 风筝
    tags: frozenset[str]


class Place(NamedTuple):
    name: str
    at: str  # the name with its locative: 公园里, 草地上
    tags: frozenset[str]


# Names must not occur inside ordinary words of the plots (so no 天天, 甜甜, 小雨), nor in a thing or a place.
_CHARACTERS = {
    ("child", "他"): "汤姆 杰瑞 小明 小刚 小强 小杰 乐乐 东东 豆豆 壮壮 阿宝 大卫 杰克 皮皮 浩浩 飞飞 牛牛 阿力 冬冬 毛毛",
    ("child", "她"): "小红 小丽 小美 莉莉 安娜 露西 朵朵 妞妞 婷婷 丫丫 珍珍 苗苗 琪琪 彤彤 艾米 玛丽 苏菲 佳佳 小芳 米娅",
    ("animal", "它"): "小兔 小熊 小猪 小猴 小鹿 小羊 小牛 小马 小象 小狗 小猫 小鸭 小鸡 小狐狸 小刺猬 小松鼠 小老鼠 小乌龟 小狮子 小老虎",
    ("family", "他"): "爸爸 爷爷",
    ("family", "她"): "妈妈 奶奶",
    ("neighbour", "他"): "李老师 陈伯伯 孙大叔 猫头鹰先生",
    ("neighbour", "她"): "王老师 刘阿姨 山羊婆婆 白鹅大婶",
}
CHARACTERS = tuple(Character(n, pronoun, kind) for (kind, pronoun), row in _CHARACTERS.items() for n in row.split())

# tags → rows of "measure word: things".  lost: small and dear, can be dropped outdoors and found again.  toy: two can
# play with it.  gift: can be wrapped.  fragile: breaks when dropped.  food: can be shared in pieces.  round: rolls.
_THINGS = {
    "lost gift toy": "个:皮球 布娃娃 陀螺 飞盘|辆:玩具车|架:纸飞机|只:毽子|面:小鼓|根:跳绳",
    "lost gift": "支:笛子|把:口琴 小雨伞|本:故事书|顶:草帽|条:围巾|块:手表|个:铃铛 水壶 音乐盒 望远镜|串:手链",
    "lost": "个:竹蜻蜓|枚:贝壳|根:羽毛|条:手帕",
    "gift toy": "盒:积木 拼图|列:小火车|只:风筝",
    "gift": "盒:彩笔|盏:灯笼|个:闹钟",
    "fragile": "个:花瓶 茶壶 盘子 玻璃罐|面:镜子|盏:台灯",
    "food round": "个:苹果 桃子 橘子 西瓜",
    "food": "个:面包 包子|块:蛋糕 饼干 月饼|串:葡萄 糖葫芦|根:香蕉 玉米|盒:草莓",
    "plant": "株:向日葵 牵牛花 西红柿 豌豆|棵:小桃树 葡萄藤",
    "build": "座:树屋 小城堡 小木桥|个:秋千 稻草人 鸟屋",
}
THINGS = tuple(
    Thing(name, group.split(":")[0], frozenset(tags.split()))
    for tags, row in _THINGS.items()
    for group in row.split("|")
    for name in group.split(":")[1].split()
)

# tags → places written name+locative.  out: under the sky.  play: where children run about.  wild: one can get lost.
# grow: earth to plant in.  home, public: indoors.  dim: dark and full of old things.  sky: the stars can be seen.
_PLACES = {
    "out play wild sky": "树林+里 竹林+里 山坡+上 河滩+上 田野+里",
    "out play sky": "公园+里 草地+上 操场+上 沙滩+上 广场+上 小河+边 池塘+边 小桥+边 湖+边",
    "out play grow sky": "花园+里 果园+里 院子+里 菜园+里",
    "out play": "游乐园+里 老槐树+下 村口+ 街心花坛+边",
    "home": "客厅+里 厨房+里 书房+里 卧室+里 餐厅+里",
    "dim": "阁楼+上 山洞+里 旧仓库+里 地下室+里 储藏室+里 小木屋+里",
    "public": "教室+里 图书馆+里 礼堂+里 活动室+里 体育馆+里 书店+里",
}
PLACES = tuple(
    Place(entry.split("+")[0], entry.replace("+", ""), frozenset(tags.split())) for tags, row in _PLACES.items() for entry in row.split()
)

# Words worth naming in an instruction ("use these words"), looked for in the finished text.
FEELINGS = (
    "开心 高兴 快乐 难过 伤心 害怕 着急 生气 后悔 惊喜 感动 勇敢 骄傲 害羞 好奇 温暖 幸福 孤单 担心 羡慕 得意 紧张 满意 失望 耐心 诚实"
).split()
