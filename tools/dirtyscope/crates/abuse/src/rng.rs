// SPDX-License-Identifier: GPL-2.0-only

//! Where all choices come from, and the numbers at which code goes wrong.

/// splitmix64: each input has one of its own, so that it can be made again alone.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    /// For input `number` of a seed.
    pub fn new(seed: u64, phase: &str, number: u64) -> Self {
        let phase = phase.bytes().fold(seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3).rotate_left(7)
        });
        let mut this = Self(phase);
        this.0 = this.next() ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        this.next();
        this
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// One of these.
    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// A number at a boundary of 64 bits, of these limits, or any.
    pub fn u64(&mut self, limits: &[u64]) -> u64 {
        let near = |this: &mut Self, value: u64| match this.below(3) {
            0 => value.wrapping_sub(1),
            1 => value,
            _ => value.wrapping_add(1),
        };
        match self.below(8) {
            0..3 if !limits.is_empty() => {
                let limit = self.pick(limits);
                near(self, limit)
            }
            0..6 => self.pick(&BOUNDARIES),
            6 => {
                let shift = self.below(64);
                near(self, 1 << shift)
            }
            _ => self.next() >> self.below(64),
        }
    }

    /// The same of 32 bits.
    pub fn u32(&mut self, limits: &[u64]) -> u32 {
        self.u64(limits) as u32
    }
}

/// Where numbers end, of any width.
pub const BOUNDARIES: [u64; 18] = [
    0,
    1,
    2,
    7,
    0xfff,
    0x1000,
    0x1001,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_f000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_e000,
    0xffff_ffff_ffff_f000,
    0xffff_ffff_ffff_fffe,
    0xffff_ffff_ffff_ffff,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_is_the_same_again() {
        let one = |phase, number| Rng::new(7, phase, number).next();
        assert_eq!(one("ioctls", 5), one("ioctls", 5));
        assert_ne!(one("ioctls", 5), one("ioctls", 6));
        assert_ne!(one("ioctls", 5), one("states", 5));
    }

    #[test]
    fn limits_and_boundaries_come() {
        let mut rng = Rng::new(1, "", 0);
        let all: Vec<_> = (0..2000).map(|_| rng.u64(&[777])).collect();
        for value in [0, 776, 777, 778, 1 << 31, 1 << 32, 1 << 63, u64::MAX] {
            assert!(all.contains(&value), "{value:#x}");
        }
    }
}
