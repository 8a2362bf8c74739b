"""Distinct prime moduli, dealt over memory layers, orders and heads.

All heads of one order share the mix and differ by modulus alone, so no two heads anywhere may have the same modulus
(arXiv 2601.07372 §2.2; released code of the paper, of DeepSeek-V4.1 and of Qwen4-Exp).

The released codes say it differently: the paper keeps one set of seen primes and restarts each order at
`rows_per_head - 1`; Qwen takes the n-th prime after `rows_per_head - 1`, n being the head's number over all layers.
With one `rows_per_head` both deal the same sequence: the primes from `rows_per_head` upwards, each once.
"""

from collections.abc import Iterator

# These bases decide every number below 3.3e24 (Sorenson and Webster 2015), so every int64.
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(number: int) -> bool:
    """Miller-Rabin with fixed bases: exact for every int64, microseconds where trial division takes milliseconds."""
    if number < 2:
        return False
    for prime in _WITNESSES:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in _WITNESSES:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def primes_from(first: int) -> Iterator[int]:
    """The primes >= `first`, ascending."""
    number = max(first, 2)
    while True:
        if is_prime(number):
            yield number
        number += 1
