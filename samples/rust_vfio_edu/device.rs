// SPDX-License-Identifier: GPL-2.0

//! The VFIO device: its registers, and commands by the `edu` device's DMA engine.

#![expect(
    clippy::indexing_slicing,
    reason = "ranges are those of a chunk, which the buffer has room for"
)]

#[path = "../rust_mdev_dma/device/command.rs"]
mod command;
#[path = "../rust_mdev_dma/device/pattern.rs"]
#[allow(dead_code)] // The generator's.
mod pattern;
#[path = "../rust_mdev_dma/device/registers.rs"]
#[allow(dead_code)] // What belongs to interrupts and migration.
mod registers;

use crate::{
    abstractions::{
        page::PageMemory,
        vfio::{test_only::BackedThatPins, DeviceInfo, OpenDevice, Operations, RegionInfo},
    },
    bindings::{
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_PIN as PIN,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_READ as READ,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_UNPIN as UNPIN,
        rust_mdev_dma_op_RUST_MDEV_DMA_OP_WRITE as WRITE, RUST_MDEV_DMA_IRQ_COMMAND,
        VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    },
    edu::{Bar, Engine, BAR_END, BUFFER_SIZE, ID},
    module_parameters,
    pins::pins,
};
use command::{whole_pages, Command, Limits, Outcome};
use core::ops::Range;
use kernel::{
    device::{Bound, Core},
    io::Io,
    new_mutex,
    page::PAGE_SIZE,
    pci,
    prelude::*,
    sync::Mutex,
    uaccess::{UserSliceReader, UserSliceWriter},
};
use pattern::{words_of, Block, Digest, WORD};
use registers::{check_bar_access, read_value, write_value, Registers, ACCESS, BAR_SIZE};

const PAGE: u64 = PAGE_SIZE as u64;

// A page fits the buffer.
const _: () = assert!(PAGE_SIZE <= BUFFER_SIZE);

/// What there is of a device whether it is open or not.
pub(crate) struct EduData {
    bar: pci::DevresBar<BAR_END>,
}

impl EduData {
    /// Fails with `ENODEV` if the device is no `edu`.
    pub(crate) fn new(pdev: &pci::Device<Core<'_>>) -> Result<Self> {
        let bar: Bar<'_> = pdev.iomap_region_sized(0, crate::NAME)?;
        if bar.read(ID).magic() != 0xed {
            return Err(ENODEV);
        }
        Ok(Self {
            bar: bar.into_devres()?,
        })
    }
}

/// An open device.
#[pin_data]
pub(crate) struct EduDevice {
    /// # Locking
    ///
    /// Held while a command runs, so across `vfio_pin_pages()` and DMA; taken before the pins.
    #[pin]
    inner: Mutex<Inner>,
}

struct Inner {
    limits: Limits,
    registers: Registers,
    /// The words of one page.
    buffer: KVVec<u64>,
}

/// The engine of an open device.
fn engine(dev: &OpenDevice<EduDevice>) -> Result<Engine<'_>> {
    let pdev: &pci::Device<Bound> = dev.parent().try_into()?;
    Ok(Engine {
        pdev,
        bar: dev.data().bar.access(pdev.as_ref())?,
    })
}

/// The digest of `bytes` of a page.
fn digest_of(memory: &PageMemory<'_>, bytes: &Range<usize>) -> u64 {
    let mut digest = Digest::new();
    memory.read_words(words_of(bytes), |i, word| digest.add(bytes, i, word));
    digest.value()
}

impl Inner {
    fn new() -> Result<Self> {
        let limits = Limits {
            ops: 1 << PIN | 1 << UNPIN | 1 << WRITE | 1 << READ,
            pins: *module_parameters::max_pins.value_ref(),
            length: *module_parameters::max_length.value_ref(),
        };
        Ok(Self {
            limits,
            registers: Registers::new(limits),
            buffer: KVVec::from_elem(0, PAGE_SIZE / WORD, GFP_KERNEL_ACCOUNT)?,
        })
    }

    fn read(&mut self, dev: &OpenDevice<EduDevice>, offset: usize, bytes: &mut [u8]) {
        if Registers::touches_pins(offset, bytes.len()) {
            self.registers.set_pins(pins(dev).held());
        }
        self.registers.read(offset, bytes);
    }

    fn write(&mut self, dev: &OpenDevice<EduDevice>, offset: usize, bytes: &[u8]) {
        let effects = self.registers.write(offset, bytes);
        if let Some((command, background)) = effects.command {
            let mut outcome = Outcome::default();
            let done = if background {
                Err(EOPNOTSUPP)
            } else {
                self.run(dev, &command, &mut outcome)
            };
            if let Err(e) = done {
                outcome.status = e.to_errno().unsigned_abs();
            }
            self.registers.complete(&outcome);
            self.registers.raise(RUST_MDEV_DMA_IRQ_COMMAND);
        }
        if effects.generator.is_some() {
            let none = EOPNOTSUPP.to_errno().unsigned_abs();
            self.registers.set_generator(false, none, 0);
        }
    }

    fn run(
        &mut self,
        dev: &OpenDevice<EduDevice>,
        command: &Command,
        outcome: &mut Outcome,
    ) -> Result {
        let range = self.limits.range(command)?;
        match command.op {
            PIN => {
                let range = whole_pages(range)?;
                let pages = range.end.saturating_sub(range.start) / PAGE;
                let mut pins = pins(dev);
                if pages > self.limits.pins.saturating_sub(pins.held()) {
                    return Err(ENOSPC);
                }
                pins.pin(range)?;
                outcome.count = command.length;
            }
            UNPIN => {
                pins(dev).unpin(whole_pages(range)?)?;
                outcome.count = command.length;
            }
            op => {
                let seed = (op == WRITE).then_some(command.seed);
                let digest = self.dma(dev, range, seed, &mut outcome.count)?;
                if op == READ {
                    outcome.digest = digest;
                }
            }
        }
        Ok(())
    }

    /// Has the device write the pattern of `seed`, or read if there is none. Returns the digest.
    fn dma(
        &mut self,
        dev: &OpenDevice<EduDevice>,
        range: Range<u64>,
        seed: Option<u64>,
        count: &mut u64,
    ) -> Result<u64> {
        let bits = module_parameters::address_bits.value();
        if bits < u64::BITS && range.end > 1 << bits {
            return Err(EOVERFLOW);
        }
        let engine = engine(dev)?;
        let pins = pins(dev);
        let mut digest = Digest::new();
        let mut done = Ok(());
        pins.access(range, |page, bytes, memory| {
            if done.is_ok() {
                done = if dev.interrupted() {
                    Err(EINTR)
                } else {
                    self.round_trip(&engine, page, &bytes, memory, seed)
                };
            }
            if done.is_ok() {
                *count = count.wrapping_add(bytes.len() as u64);
                for i in words_of(&bytes) {
                    digest.add(&bytes, i, self.buffer[i]);
                }
            }
        })?;
        done.map(|()| digest.value())
    }

    /// Moves `bytes` of the page at IOVA `page` to the device's buffer and back: what they are, or
    /// the pattern of `seed`. In between they are inverted, so what is right in the end came by
    /// DMA. Fails with `EIO` if it isn't.
    ///
    /// The words are in `self.buffer` then.
    fn round_trip(
        &mut self,
        engine: &Engine<'_>,
        page: u64,
        bytes: &Range<usize>,
        memory: &PageMemory<'_>,
        seed: Option<u64>,
    ) -> Result {
        let words = words_of(bytes);
        memory.read_words(words.clone(), |i, word| self.buffer[i] = word);
        if let Some(seed) = seed {
            let block = Block::of(seed, page);
            for i in words {
                self.buffer[i] = block.word(i);
            }
        }
        let byte = |i: usize| self.buffer[i / WORD].to_le_bytes()[i % WORD];
        let iova = page.wrapping_add(bytes.start as u64);

        memory.write_bytes(bytes.clone(), byte);
        let expected = digest_of(memory, bytes);
        engine.load(iova, bytes.len())?;
        memory.write_bytes(bytes.clone(), |i| !byte(i));
        let stored = engine.store(iova, bytes.len());
        if stored.is_err() || digest_of(memory, bytes) != expected {
            // A READ leaves what was there.
            memory.write_bytes(bytes.clone(), byte);
            return Err(EIO);
        }
        Ok(())
    }
}

#[vtable]
impl Operations for EduDevice {
    type OwnerModule = crate::LocalModule;
    type Iommu = BackedThatPins;
    type Data = EduData;

    const NAME: &'static CStr = crate::NAME;

    fn open(dev: &OpenDevice<Self>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- new_mutex!(Inner::new()?, "EduDevice::inner"),
            _: { engine(dev)?.enable() },
        })
    }

    fn close(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        if let Ok(engine) = engine(dev) {
            engine.disable();
        }
    }

    fn info(self: Pin<&Self>, _dev: &OpenDevice<Self>) -> DeviceInfo {
        DeviceInfo {
            flags: 0,
            num_regions: 1,
        }
    }

    fn region_info(self: Pin<&Self>, _dev: &OpenDevice<Self>, _index: u32) -> Result<RegionInfo> {
        Ok(RegionInfo {
            flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
            size: BAR_SIZE as u64,
            offset: 0,
        })
    }

    fn read(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        mut buf: UserSliceWriter,
        offset: u64,
    ) -> Result<usize> {
        let (offset, len) = (usize::try_from(offset)?, buf.len());
        check_bar_access(offset, len)?;
        let mut bytes = [0; ACCESS];
        self.inner.lock().read(dev, offset, &mut bytes[..len]);
        write_value(&mut buf, u64::from_le_bytes(bytes))?;
        Ok(len)
    }

    fn write(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        mut buf: UserSliceReader,
        offset: u64,
    ) -> Result<usize> {
        let (offset, len) = (usize::try_from(offset)?, buf.len());
        check_bar_access(offset, len)?;
        let bytes = read_value(&mut buf)?.to_le_bytes();
        self.inner.lock().write(dev, offset, &bytes[..len]);
        Ok(len)
    }

    fn reset(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        let mut inner = self.inner.lock();
        if let Ok(engine) = engine(dev) {
            engine.enable();
        }
        pins(dev).unpin_all();
        inner.registers = Registers::new(inner.limits);
    }
}
