"""Over how many tokens xPos can be represented, in which dtype."""

import math


# xPos multiplies queries by zeta ** (p / base) and keys by zeta ** (-p / base); the smallest zeta is 0.4 / 1.4.
LOG_ZETA = math.log(1.4 / 0.4)
# Natural logarithms of the largest numbers, less room for the features themselves. The product of a query with a key
# that the causal mask hides afterwards has to be finite too.
MAX_LOG_PRODUCT = math.log(3.4e38) - 8
MAX_LOG_FLOAT16 = math.log(65504) - 4


class XposRangeMixin:
    """For configurations with `xpos_scale_base`."""

    @property
    def xpos_is_centred_per_segment(self) -> bool:
        """Whether any two tokens that see each other lie in one segment of the largest length.

        Then xPos counts from that segment's middle, and texts of any length can be represented.
        """
        largest = self.segment_lengths[-1]
        is_plain = self.num_sink_tokens == 0 and self.local == "segment"
        return is_plain and all(largest % length == 0 for length in self.segment_lengths)

    @property
    def xpos_range(self) -> int:
        """Number of tokens over which the xPos exponent runs, centred."""
        return self.segment_lengths[-1] if self.xpos_is_centred_per_segment else self.max_position_embeddings

    @property
    def xpos_fits_float16(self) -> bool:
        """Whether queries and keys stay finite in float16 after xPos; if not, that attention is computed in float32."""
        return self.xpos_range / 2 * LOG_ZETA / self.xpos_scale_base <= MAX_LOG_FLOAT16

    def check_xpos_range(self) -> None:
        """Raises a ValueError where float32 cannot hold what xPos makes of the farthest tokens that see each other."""
        longest = MAX_LOG_PRODUCT * self.xpos_scale_base / LOG_ZETA
        if self.xpos_range > longest:
            needed = math.ceil(self.xpos_range * LOG_ZETA / MAX_LOG_PRODUCT)
            name = "segment_lengths" if self.xpos_is_centred_per_segment else "max_position_embeddings"
            raise ValueError(
                f"`{name}`: xPos with `xpos_scale_base={self.xpos_scale_base}` can be represented in float32 over "
                f"{int(longest)} tokens, got {self.xpos_range}. Use an `xpos_scale_base` of at least {needed}, or "
                "`position_embedding_type='rope'`."
            )
