// SPDX-License-Identifier: GPL-2.0-only

//! What the generator is told to do, and what it writes then: see the uapi header.
//!
//! The driver has an implementation of its own; scenarios hold memory against this one.

use crate::{
    IN_PROGRESS, MdevDma, PAGE, RegisterAccess, Width,
    pattern::{STEP, mix},
    uapi,
};

const STRIDE: u64 = uapi::RUST_MDEV_DMA_GEN_STRIDE as u64;

/// What the generator is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratorConfig {
    /// Where its range begins.
    pub iova: u64,
    /// Bytes of its range.
    pub length: u64,
    /// What order and contents follow from.
    pub seed: u64,
    /// Writes after which it stops by itself; 0: never.
    pub limit: u64,
    /// Pages per second; 0: as fast as it can.
    pub rate: u32,
    /// Methods of writing: `RUST_MDEV_DMA_GEN_*`
    pub mode: u32,
}

impl GeneratorConfig {
    /// Pages of its range.
    pub fn pages(&self) -> u64 {
        self.length / PAGE
    }

    /// The IOVA of the page that write `n` goes to.
    pub fn page(&self, n: u64) -> u64 {
        let pages = self.pages();
        self.iova + (n % pages * STRIDE + mix(self.seed) % pages) % pages * PAGE
    }

    /// The seed of the pattern that write `n` puts there.
    pub fn seed(&self, n: u64) -> u64 {
        mix(self.seed.wrapping_add(n.wrapping_add(1).wrapping_mul(STEP)))
    }

    /// How write `n` is made: a bit of the mode.
    pub fn method(&self, n: u64) -> u32 {
        let methods: Vec<u32> =
            (0..u32::BITS).map(|bit| 1 << bit).filter(|bit| self.mode & bit != 0).collect();
        let turn = (n % self.pages() + n / self.pages()) % methods.len() as u64;
        methods[turn as usize]
    }
}

/// How far the generator is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneratorStatus {
    /// `EINPROGRESS` while it runs, else 0 or the errno that stopped it.
    pub status: u32,
    /// Writes made.
    pub counter: u64,
}

impl GeneratorStatus {
    /// Whether it runs.
    pub fn is_running(&self) -> bool {
        self.status == IN_PROGRESS
    }
}

impl<A: RegisterAccess> MdevDma<A> {
    /// Starts the generator.
    pub fn start_generator(&self, config: &GeneratorConfig) -> Result<(), A::Error> {
        self.control_generator(uapi::RUST_MDEV_DMA_GEN_START, config)
    }

    /// Has the generator do what `config` says, counting on from where it is.
    pub fn continue_generator(&self, config: &GeneratorConfig) -> Result<(), A::Error> {
        self.control_generator(uapi::RUST_MDEV_DMA_GEN_CONTINUE, config)
    }

    /// Lets the generator go on with what its registers say.
    pub fn resume_generator(&self) -> Result<(), A::Error> {
        self.write_generator_control(uapi::RUST_MDEV_DMA_GEN_CONTINUE)
    }

    /// Stops the generator; it writes no more.
    pub fn stop_generator(&self) -> Result<GeneratorStatus, A::Error> {
        self.write_generator_control(uapi::RUST_MDEV_DMA_GEN_STOP)?;
        self.generator()
    }

    /// How far the generator is. While it runs, it may be further by now.
    pub fn generator(&self) -> Result<GeneratorStatus, A::Error> {
        Ok(GeneratorStatus {
            status: self.read_long(uapi::RUST_MDEV_DMA_REG_GEN_STATUS)?,
            counter: self.read(uapi::RUST_MDEV_DMA_REG_GEN_COUNTER, Width::Quad)?,
        })
    }

    /// What the generator's registers say it is to do.
    pub fn generator_config(&self) -> Result<GeneratorConfig, A::Error> {
        Ok(GeneratorConfig {
            iova: self.read(uapi::RUST_MDEV_DMA_REG_GEN_IOVA, Width::Quad)?,
            length: self.read(uapi::RUST_MDEV_DMA_REG_GEN_LENGTH, Width::Quad)?,
            seed: self.read(uapi::RUST_MDEV_DMA_REG_GEN_SEED, Width::Quad)?,
            limit: self.read(uapi::RUST_MDEV_DMA_REG_GEN_LIMIT, Width::Quad)?,
            rate: self.read_long(uapi::RUST_MDEV_DMA_REG_GEN_RATE)?,
            mode: self.read_long(uapi::RUST_MDEV_DMA_REG_GEN_MODE)?,
        })
    }

    /// Writes `config`, then `control`, which is a number so that one that isn't any can be tried.
    pub fn control_generator(
        &self,
        control: u32,
        config: &GeneratorConfig,
    ) -> Result<(), A::Error> {
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_IOVA, Width::Quad, config.iova)?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_LENGTH, Width::Quad, config.length)?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_SEED, Width::Quad, config.seed)?;
        self.write(uapi::RUST_MDEV_DMA_REG_GEN_LIMIT, Width::Quad, config.limit)?;
        self.write_long(uapi::RUST_MDEV_DMA_REG_GEN_RATE, config.rate)?;
        self.write_long(uapi::RUST_MDEV_DMA_REG_GEN_MODE, config.mode)?;
        self.write_generator_control(control)
    }

    fn write_generator_control(&self, control: u32) -> Result<(), A::Error> {
        self.write_long(uapi::RUST_MDEV_DMA_REG_GEN_CONTROL, control)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(seed: u64, pages: u64) -> GeneratorConfig {
        GeneratorConfig { iova: 0x10_0000, length: pages * PAGE, seed, limit: 0, rate: 0, mode: 7 }
    }

    #[test]
    fn writes_are_what_the_header_says() {
        // Computed from the header's text by other means than this code.
        for (seed, pages, n, page, its_seed, method) in [
            (0, 1, 0, 0, 0xe220_a839_7b1d_cdaf, 1),
            (1, 7, 0, 6, 0x910a_2dec_8902_5cc1, 1),
            (1, 7, 6, 1, 0xe099_ec6c_d736_3ca5, 1),
            (1, 7, 7, 6, 0x85e7_bb0f_1227_8575, 2),
            (0xdead_beef, 1000, 123_456, 730, 0x5080_78d9_6273_b4df, 1),
            (u64::MAX, (1 << 31) - 1, (1 << 31) - 2, 1_043_656_645, 0xbc73_4d88_78ac_3686, 1),
        ] {
            let config = config(seed, pages);
            assert_eq!(config.page(n), config.iova + page * PAGE, "page of write {n}");
            assert_eq!(config.seed(n), its_seed, "seed of write {n}");
            assert_eq!(config.method(n), method, "method of write {n}");
        }
    }

    #[test]
    fn writes_in_a_row_write_every_page_once() {
        for pages in [1, 2, 3, 64, 1000] {
            let config = config(42, pages);
            for first in [0, 1, pages / 2, 5 * pages + 1] {
                let mut written: Vec<_> = (first..first + pages).map(|n| config.page(n)).collect();
                written.sort_unstable();
                let all: Vec<_> = (0..pages).map(|page| config.iova + page * PAGE).collect();
                assert_eq!(written, all);
            }
        }
    }

    #[test]
    fn a_page_is_written_by_every_method() {
        let config = GeneratorConfig { mode: 0b101, ..config(1, 8) };
        let methods: Vec<_> = (0..2).map(|round| config.method(8 * round)).collect();
        assert_eq!(methods, [1, 4]);
    }
}
