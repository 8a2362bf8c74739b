"""XXH64 against the reference implementation's own output, at every length that takes another path through it."""

import numpy as np
import pytest

from engram_lm.kernels import checksums

# Printed by the reference implementation (xxhash 3.x, libxxhash 0.8, seed 0).
KNOWN = {
    b"": 0xEF46DB3751D8E999,
    b"a": 0xD24EC4F1A98C6E5B,
    b"abc": 0x44BC2CF5AD770999,
    b"xxhash": 0x32DD38952C4BC720,
    b"Nobody inspects the spammish repetition": 0xFBCEA83C8A378BF1,
    bytes(range(32)): 0xCBF59C5116FF32B4,
    bytes(range(101)): 0xE99038495F85381E,
    bytes(4096): 0xAC869B6F32D8BBDB,
}
# xxh64(PATTERN[:n]) for n from 0 to 100.
PATTERN = np.array([(i * 2654435761 >> 13) & 255 for i in range(101)], np.uint8)
_BY_LENGTH = """
ef46db3751d8e999 e934a84adb052768 0cd811486f07af67 28823e205e353f69 91b65bbe720c34cf 31fce8da85d2b801
ccb91b19a2295c7c e2400cdea02ee3c5 521fd2878ea69d17 192535de38f73596 83e5e4e920f92870 89254e83ede19f13
3fb737ea78f531bb cbcfb789e391e255 3c0f9385dd1c6e8d 4ee77ab371d06e31 b1a375c6bd6ba7af bbe746d4e95f47cc
e4ca0c1102dbefbd 5c7f78ae263e1dbf 9468e9f65cdaf848 d6adbb230f1b77e6 61be8f16a37d0ea6 33daba9ff79f1411
96d6d4e311200682 4bf8998b414fc87e 85b46ed06ba171dc cb179c43e9330835 59677f4ef8af5e38 00e9e4b40ccf4cee
85294cb4679de6dd b74baa9042b94dee 4e13111ced6f735d f7b9faf20b3bce63 e67a20ab57b411dc 1df5bd24169bdd20
3c4249d3e63d33a8 8b4ae0394dc84a49 7f7cd2f0df107d56 660ad039b5045b84 2b6e688996c3747c 5882e3a87fa97235
245b46c5879a8ae0 790c6e769679ca56 77701e5b96123098 8334078db7027cc3 f1eb283304318340 bbc1c6d421088b6a
557151523479ed85 33acca17887d632a 78a5c4c596d488b8 e5c5ac0ec189edc8 59831837c1fac70a c9282403d81edcff
f31acdd14ac16423 62e923c2a1260556 4c6d5189d62d87b9 cfc93e37fe2d7fb6 daa44eef835af5bd 7373255815943525
3a57d4f338d2c61e 757757dcb16093cc e516fb9d616a1989 35f935e6044a08ad cd91daec2c21766f 7c795c59456ed577
24be48c58a8cf7c4 29970e907b052bd5 a4bf2168bcd017b4 143945cef55e82d1 8386634111591081 c34eda66b8cb41f2
34f9018093cfb836 75d2d5d8e7772547 344a0c3d18d78a91 b2ff0c6d615c62a0 35838e0cf284f101 111755f7f2544507
8d6e377234455674 fe35197a5a2875d3 f9215a4df088bbbc 008fe5f0410b5d94 1c72a4dbab4ca9af 552d53f844964d73
d3321db484286916 b25863a21776966a ce2aba6e78a8df30 c56a2b392729ef13 8adff38715187f18 95603b1e5b68034c
5b1714e9ae6f81d7 9f4aee31b04fab48 c7cad4384c8f0ecd f3460b9507a97c3b 4a5fc647b26da922 43e31ab374b5317c
00943940f9ef4f42 8e5c56c72a19b963 2a5951cfb5b3c909 e7f1e2c22f43ca65 d61ea92c5ae13676
"""
BY_LENGTH = _BY_LENGTH.split()


def hashed(data: bytes | np.ndarray) -> int:
    return int(checksums.xxh64(np.frombuffer(data, np.uint8)))


@pytest.mark.parametrize("data", KNOWN, ids=lambda data: f"{len(data)} bytes")
def test_published_values(data):
    assert hashed(data) == KNOWN[data]


def test_every_length_to_100():
    assert len(BY_LENGTH) == 101
    assert [f"{hashed(PATTERN[:n].tobytes()):016x}" for n in range(101)] == BY_LENGTH


def test_where_the_bytes_lie_in_memory_does_not_matter():
    """Odd addresses, writable or not: 8-byte words are read from any of them."""
    room = np.zeros(120, np.uint8)
    for start in range(9):
        room[start : start + 101] = PATTERN
        assert f"{int(checksums.xxh64(room[start : start + 100])):016x}" == BY_LENGTH[100]


def test_the_reference_implementation_agrees_where_it_is_installed():
    xxhash = pytest.importorskip("xxhash")
    data = np.random.default_rng(0).integers(0, 256, 20_000, dtype=np.uint8)
    for n in [*range(300), 4095, 4096, 4097, 20_000]:
        assert hashed(data[:n].tobytes()) == xxhash.xxh64(data[:n].tobytes(), seed=0).intdigest()


def test_pages_are_summed_and_the_first_bad_one_is_named():
    data = np.random.default_rng(1).integers(0, 256, 5 * checksums.PAGE, dtype=np.uint8)
    sums = np.empty(5, np.uint32)
    checksums.page_sums(data, sums)
    for page in range(5):
        assert int(sums[page]) == hashed(data[page * 4096 : (page + 1) * 4096].tobytes()) & 0xFFFFFFFF
    assert checksums.first_bad_page(data, sums) == -1
    for page in (4, 2, 0):
        data[page * 4096 + 17] ^= 1
        assert checksums.first_bad_page(data, sums) == page


def test_pages_that_are_missing_are_bad():
    data, sums = np.zeros(2 * checksums.PAGE, np.uint8), np.empty(2, np.uint32)
    checksums.page_sums(data, sums)
    assert checksums.first_bad_page(data[: checksums.PAGE], sums) == 1
    assert checksums.first_bad_page(data[: checksums.PAGE + 100], sums) == 1
    assert checksums.first_bad_page(data[:0], sums) == 0
