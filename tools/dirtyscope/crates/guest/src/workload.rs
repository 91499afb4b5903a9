// SPDX-License-Identifier: GPL-2.0-only

//! What goes on all the time: device and CPU write, and what they wrote before is checked.

use crate::{
    function::{Bar, Function, UIO},
    interrupts::Interrupts,
    memory::HugePage,
};
use anyhow::{Result, bail, ensure};
use mdev_dma::{
    GeneratorConfig, GeneratorStatus, MdevDma, Opcode, PAGE,
    uapi::{RUST_MDEV_DMA_GEN_DMA_RW, RUST_MDEV_DMA_GEN_PIN},
};
use std::{fmt, ops::Range, thread, time::Duration};

/// Pages that a command, or the CPU, writes at a time.
pub const BATCH: u64 = 8;

/// What is asked of device and CPU.
pub struct Parameters {
    /// Pages per second, of each writer.
    pub rate: u32,
    /// Pages that each has to write to: at least two batches, at most those of a huge page.
    pub pages: u64,
    /// What the contents follow from.
    pub seed: u64,
}

/// Who writes pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Writer {
    /// The device's generator: by `vfio_dma_rw()`, and with a pin for each write.
    Generator,
    /// Commands, through pins that the device has all the time.
    Write,
    /// Commands, by `vfio_dma_rw()`, where no page is pinned.
    DmaWrite,
    /// The CPU, which is nobody's fault but the VMM's own.
    Cpu,
}

impl Writer {
    const ALL: [Self; 4] = [Self::Generator, Self::Write, Self::DmaWrite, Self::Cpu];
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Generator => "the device's generator",
            Self::Write => "WRITE, through pins",
            Self::DmaWrite => "DMA_WRITE, by vfio_dma_rw()",
            Self::Cpu => "the CPU",
        })
    }
}

/// Memory that one of them writes, and how many pages it has written.
struct Area {
    writer: Writer,
    page: HugePage,
    written: u64,
}

/// A device, and memory for it and the CPU to write to.
pub struct Workload {
    function: Function,
    device: MdevDma<Bar>,
    interrupts: Interrupts,
    areas: Vec<Area>,
    generator: GeneratorConfig,
    /// Writes that the generator had made when the device was found, since it was reset or started.
    found: u64,
    /// Writes of the generator, since it was started, of which we know.
    counter: u64,
    /// Pages that each writes to.
    pages: u64,
    /// Batches that each but the generator has written.
    batches: u64,
    checks: u64,
    /// Resets, and how many writes the generator was still to make at the last one.
    resets: (u64, u64),
}

impl Workload {
    /// Finds and enables the device, takes memory, and lets the generator write to it.
    pub fn start(
        address: Option<&str>,
        &Parameters { rate, pages, seed }: &Parameters,
    ) -> Result<Self> {
        let function = Function::find(address)?;
        function.refuse_driver()?;
        function.refuse_iommu()?;
        let taken = HugePage::take(Writer::ALL.len())?.into_iter().zip(Writer::ALL);
        let areas: Vec<_> = taken.map(|(page, writer)| Area { writer, page, written: 0 }).collect();
        function.bind_uio()?;
        let device = function.open()?;
        let (pins, before) = (device.pins()?, device.generator()?);
        let writes = before.is_running();
        ensure!(
            pins == 0 && !writes,
            "the device has {pins} pins that somebody left{}: echo 1 > /sys/bus/pci/devices/{}/reset",
            if writes { ", and writes" } else { "" },
            function.address()
        );
        let interrupts = Interrupts::set_up(&function, &device)?;
        let generator = GeneratorConfig {
            iova: areas[0].page.iova,
            length: pages * PAGE,
            seed,
            limit: pages / 2,
            rate,
            mode: RUST_MDEV_DMA_GEN_DMA_RW | RUST_MDEV_DMA_GEN_PIN,
        };
        let mut this = Self {
            function,
            device,
            interrupts,
            areas,
            generator,
            found: before.counter,
            counter: 0,
            pages,
            batches: 0,
            checks: 0,
            resets: (0, 0),
        };
        this.begin()?;
        Ok(this)
    }

    /// Lets the generator write, and gets ready for commands to do.
    fn begin(&mut self) -> Result<()> {
        self.pin()?;
        self.counter = 0;
        Ok(self.device.start_generator(&self.generator)?)
    }

    /// Pins what is written through pins.
    fn pin(&mut self) -> Result<()> {
        for area in self.areas.iter().filter(|area| area.writer == Writer::Write) {
            let iova = area.page.iova;
            let outcome = self.device.pin(iova, self.pages * PAGE)?;
            ensure!(outcome.status == 0, "PIN of {iova:#x} ended with errno {}", outcome.status);
        }
        Ok(())
    }

    /// The time from one [`Self::write`] to the next.
    pub fn period(&self) -> Duration {
        Duration::from_secs(BATCH) / self.generator.rate
    }

    /// Has everybody write some pages, after what they had was checked. The error is what is wrong.
    pub fn write(&mut self) -> Result<()> {
        self.generate()?;
        for i in 0..self.areas.len() {
            self.write_batch(i)?;
        }
        self.batches += 1;
        Ok(())
    }

    /// Lets the generator go on, if it has written its burst.
    fn generate(&mut self) -> Result<()> {
        let status = self.device.generator()?;
        if status.is_running() {
            return Ok(());
        }
        ensure!(status.status == 0, "the generator has stopped with errno {}", status.status);
        self.account(status.counter)?;
        let page = &self.areas[0].page;
        if !page.wrong_pages(page.bytes(0, self.pages)).is_empty() {
            return self.check();
        }
        // Half of its pages at a time, so that what it wrote shortly before a machine went elsewhere is
        // still there to be checked. And it's the most that it can do to memory that isn't ours any
        // more, should this process be killed.
        self.generator.limit = status.counter + self.pages / 2;
        Ok(self.device.continue_generator(&self.generator)?)
    }

    /// Takes note of what the generator has written, which has stopped.
    fn account(&mut self, counter: u64) -> Result<()> {
        let Area { page, written, .. } = &mut self.areas[0];
        let (before, limit) = (self.counter, self.generator.limit);
        ensure!(
            (before..=limit).contains(&counter),
            "the generator has made {counter} writes: it was at {before}, and stops at {limit}"
        );
        page.contents.generated(0, &self.generator, before..counter);
        *written += counter - before;
        self.counter = counter;
        Ok(())
    }

    /// Has some pages written.
    fn write_batch(&mut self, i: usize) -> Result<()> {
        let first = self.batches * BATCH % self.pages;
        let seed = self.generator.seed.wrapping_add(4 * self.batches + i as u64);
        let Area { writer, page, .. } = &self.areas[i];
        let (writer, bytes) = (*writer, page.bytes(first, BATCH));
        if writer != Writer::Generator && !page.wrong_pages(bytes.clone()).is_empty() {
            return self.check();
        }
        match writer {
            Writer::Generator => return Ok(()),
            Writer::Write => self.run(Opcode::Write, &bytes, seed)?,
            Writer::DmaWrite => self.run(Opcode::DmaWrite, &bytes, seed)?,
            Writer::Cpu => self.areas[i].page.fill(bytes.clone(), seed),
        }
        let Area { page, written, .. } = &mut self.areas[i];
        if writer != Writer::Cpu {
            page.contents.commanded(bytes, seed);
        }
        *written += BATCH;
        Ok(())
    }

    /// Runs a command, every other time in the background.
    fn run(&mut self, opcode: Opcode, bytes: &Range<u64>, seed: u64) -> Result<()> {
        let (iova, length) = (bytes.start, bytes.end - bytes.start);
        let outcome = if self.batches % 2 == 0 {
            self.device.run(opcode as u32, iova, length, seed)?
        } else {
            self.interrupts.arm(&self.device)?;
            self.device.run_in_background(opcode, iova, length, seed)?;
            self.interrupts.wait(&self.function, &self.device)?
        };
        ensure!(
            outcome.status == 0 && outcome.count == length,
            "{opcode} {iova:#x}+{length:#x} ended with errno {}, after {:#x} bytes",
            outcome.status,
            outcome.count
        );
        Ok(())
    }

    /// Checks all memory, and that the device is as it was. The error says what is wrong.
    pub fn check(&mut self) -> Result<()> {
        let status = self.device.stop_generator()?;
        self.account(status.counter)?;
        self.check_memory()?;
        let pins = self.device.pins()?;
        ensure!(pins == self.pages, "the device has {pins} pins, not {}", self.pages);
        Ok(self.device.resume_generator()?)
    }

    /// Checks all memory, to which the device doesn't write now.
    fn check_memory(&mut self) -> Result<()> {
        self.checks += 1;
        let mut wrong = Vec::new();
        for Area { writer, page, .. } in &self.areas {
            page.check_place()?;
            let pages = page.wrong_pages(page.bytes(0, self.pages));
            if !pages.is_empty() {
                wrong.push(format!("what {writer} writes isn't what was written\n{pages}"));
            }
        }
        if !wrong.is_empty() {
            bail!(wrong.join("\n"));
        }
        Ok(())
    }

    /// Resets the device while its generator writes: it must forget everything, and all that it has written must
    /// be there. Then begins anew. The error says what is wrong.
    pub fn reset(&mut self) -> Result<()> {
        while self.device.generator()?.is_running() {
            thread::sleep(self.period());
        }
        self.generate()?;
        // Twice as much as usual, so that it doesn't end before the kernel comes to reset the device.
        self.generator.limit += self.pages / 2;
        self.device.continue_generator(&self.generator)?;
        self.function.reset()?;
        self.device.check()?;
        let (now, pins) = (self.device.generator()?, self.device.pins()?);
        ensure!(
            now == GeneratorStatus { status: 0, counter: 0 } && pins == 0,
            "after a reset the device has {pins} pins, and its generator is at {now:?}"
        );
        // How far it came, only memory knows.
        let (page, generator) = (&self.areas[0].page, &self.generator);
        let was_made = |&n: &u64| page.has(generator.page(n), generator.seed(n));
        let made = (self.counter..generator.limit).take_while(was_made).count() as u64;
        self.account(self.counter + made)?;
        self.resets = (self.resets.0 + 1, self.generator.limit - self.counter);
        self.check_memory()?;
        self.generator.seed = self.generator.seed.wrapping_add(1);
        self.generator.limit = self.pages / 2;
        self.begin()
    }

    /// Stops the device, and has it forget our memory.
    pub fn stop(&mut self) -> Result<()> {
        self.device.stop_generator()?;
        self.device.enable_irqs(0)?;
        for area in self.areas.iter().filter(|area| area.writer == Writer::Write) {
            let outcome = self.device.unpin(area.page.iova, self.pages * PAGE)?;
            let errno = outcome.status;
            ensure!(errno == 0, "UNPIN of {:#x} ended with errno {errno}", area.page.iova);
        }
        Ok(())
    }

    /// Keeps the device from writing anything more.
    pub fn halt(&mut self) -> Result<()> {
        Ok(self.device.stop_generator().map(drop)?)
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (address, found) = (self.function.address(), self.found);
        writeln!(f, "device: {address}, whose generator had made {found} writes")?;
        match &self.interrupts {
            Interrupts::Uio { count, .. } => writeln!(f, "interrupts: {count}, by {UIO}")?,
            Interrupts::Polled => {
                writeln!(f, "interrupts: none, the device is polled: {UIO} isn't loaded")?
            }
        }
        for Area { writer, page, written } in &self.areas {
            let at = page.iova;
            writeln!(f, "written by {writer}: {written} pages, to those from {at:#x} on")?;
        }
        if let (resets @ 1.., left) = self.resets {
            writeln!(f, "resets: {resets}, the last {left} writes before the generator's end")?;
        }
        write!(
            f,
            "checked: {} times as a whole, and each page before it was written again",
            self.checks
        )
    }
}
