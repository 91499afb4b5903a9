// SPDX-License-Identifier: GPL-2.0

//! The device: its regions and VFIO operations.

mod command;
mod config_space;
mod engine;
mod generator;
mod migration;
mod pattern;
mod registers;

use crate::{
    abstractions::task::killed,
    abstractions::vfio::{
        DeviceInfo, Emulated, LoadError, MigrationOperations, OpenDevice, Operations, Parts,
        RegionInfo,
    },
    bindings::{
        RUST_MDEV_DMA_IRQ_COMMAND as IRQ_COMMAND, RUST_MDEV_DMA_IRQ_GENERATOR as IRQ_GENERATOR,
        RUST_MDEV_DMA_REGION_SHIFT as REGION_SHIFT, VFIO_DEVICE_FLAGS_PCI,
        VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_REGIONS,
        VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
    },
    module_parameters,
};
use command::{Command, Limits, Outcome};
use config_space::ConfigSpace;
use engine::Engine;
use generator::Generator;
use kernel::{
    new_mutex,
    prelude::*,
    sync::{
        atomic::{Atomic, Relaxed},
        Mutex, MutexGuard,
    },
    time::{delay::fsleep, Delta},
    uaccess::{UserSliceReader, UserSliceWriter},
};
use migration::Saved;
use registers::{check_bar_access, read_value, write_value, Registers, BAR_SIZE};

/// An open device.
#[pin_data]
pub(crate) struct MdevDma {
    /// All of the device but its pins.
    ///
    /// # Locking
    ///
    /// Held while a command runs in the foreground and while the generator writes a slice, but not
    /// while a command runs in the background. So it is held across `vfio_pin_pages()` and
    /// `vfio_dma_rw()`, which take page faults; but not across copies from and to the buffers of
    /// system calls.
    ///
    /// Taken before the locks of [`OpenDevice`] that its methods take (`pins`, `interrupts`,
    /// `logging`), after `migration`. Never taken in `dma_unmap`. [`Operations::work`] takes it, so
    /// [`OpenDevice::stop_work`] and [`OpenDevice::abort_work`] must not be called with it held; and
    /// they are called before it is taken, as the worker may hold it for as long as a page fault
    /// takes, and ends that only for them.
    #[pin]
    inner: Mutex<Inner>,
    /// How many tasks wait for `inner`, so that the generator lets them have it.
    waiting: Atomic<u32>,
}

/// The time between two attempts to lock.
const POLL: Delta = Delta::from_micros(50);

impl MdevDma {
    /// Locks `inner` for a system call. Fails with `EINTR` if the task is killed meanwhile: who holds
    /// the lock may wait for memory that this very process provides.
    fn lock(&self) -> Result<MutexGuard<'_, Inner>> {
        match self.inner.try_lock() {
            Some(inner) => Ok(inner),
            None => self.lock_killable(),
        }
    }

    #[cold]
    fn lock_killable(&self) -> Result<MutexGuard<'_, Inner>> {
        self.waiting.fetch_add(1, Relaxed);
        let inner = loop {
            if let Some(inner) = self.inner.try_lock() {
                break Ok(inner);
            }
            if killed() {
                break Err(EINTR);
            }
            fsleep(POLL);
        };
        self.waiting.fetch_sub(1, Relaxed);
        inner
    }

    /// Whether who holds `inner` for long should unlock it soon.
    fn is_awaited(&self) -> bool {
        self.waiting.load(Relaxed) > 0
    }
}

struct Inner {
    limits: Limits,
    config_space: ConfigSpace,
    registers: Registers,
    /// Runs commands; `None` while a command runs in the background.
    engine: Option<Engine>,
    /// A command that will run in the background, but hasn't started.
    queued: Option<Command>,
    generator: Generator,
    /// Whether the device may do DMA and interrupt: false while it is quiesced.
    running: bool,
}

/// A region of the device's file.
enum Region {
    ConfigSpace,
    Bar0,
}

impl Region {
    /// The region that `offset` lies in, and the offset in the region.
    fn at(offset: u64) -> Result<(Self, usize)> {
        let within = usize::try_from(offset & ((1 << REGION_SHIFT) - 1))?;
        match u32::try_from(offset >> REGION_SHIFT)? {
            VFIO_PCI_BAR0_REGION_INDEX => Ok((Self::Bar0, within)),
            VFIO_PCI_CONFIG_REGION_INDEX => Ok((Self::ConfigSpace, within)),
            _ => Err(EINVAL),
        }
    }
}

/// The number of bytes of an access that lie in configuration space. Fails with `EINVAL` if none.
fn config_space_access(offset: usize, len: usize) -> Result<usize> {
    match config_space::SIZE.checked_sub(offset) {
        None | Some(0) => Err(EINVAL),
        Some(rest) => Ok(len.min(rest)),
    }
}

impl Inner {
    fn new() -> Result<Self> {
        let limits = Limits {
            ops: Engine::ops(*module_parameters::raw_pins.value_ref()),
            pins: *module_parameters::max_pins.value_ref(),
            length: *module_parameters::max_length.value_ref(),
        };
        Ok(Self {
            limits,
            config_space: ConfigSpace::new(),
            registers: Registers::new(limits),
            engine: Some(Engine::new(limits)?),
            queued: None,
            generator: Generator::new()?,
            running: true,
        })
    }

    fn reset(&mut self) {
        self.config_space = ConfigSpace::new();
        self.registers = Registers::new(self.limits);
        self.queued = None;
        self.generator.reset();
    }

    /// Sets the device running, with what was queued while it was quiesced.
    fn resume(&mut self, dev: &OpenDevice<MdevDma>) {
        self.running = true;
        self.generator.start_pace();
        self.update_intx(dev);
        self.queue_work(dev);
    }

    fn read_bar(&mut self, dev: &OpenDevice<MdevDma>, offset: usize, bytes: &mut [u8]) {
        if Registers::touches_pins(offset, bytes.len()) {
            self.registers.set_pins(dev.pins().held());
        }
        self.registers.read(offset, bytes);
    }

    fn write_bar(&mut self, dev: &OpenDevice<MdevDma>, offset: usize, bytes: &[u8]) {
        let effects = self.registers.write(offset, bytes);
        if let Some((command, background)) = effects.command {
            self.doorbell(dev, command, background);
        }
        if let Some((control, params)) = effects.generator {
            self.generator.control(control, params, self.limits);
            self.show_generator();
            self.queue_work(dev);
        }
        if effects.interrupts {
            self.update_intx(dev);
        }
    }

    /// A write to COMMAND: runs the command, or queues it to run in the background.
    fn doorbell(&mut self, dev: &OpenDevice<MdevDma>, command: Command, background: bool) {
        let engine = match &mut self.engine {
            Some(engine) if self.queued.is_none() => engine,
            _ => return self.registers.set_refused(true),
        };
        self.registers.set_refused(false);

        if background || !self.running {
            if let Err(e) = engine.reserve(dev, &command) {
                let outcome = Outcome {
                    status: e.to_errno().unsigned_abs(),
                    ..Outcome::default()
                };
                return match self.running {
                    true => self.complete(dev, &outcome),
                    false => self.registers.complete(&outcome),
                };
            }
            self.registers.set_in_progress();
            self.queued = Some(command);
            self.queue_work(dev);
        } else {
            let outcome = engine.run(dev, &command);
            self.complete(dev, &outcome);
        }
    }

    fn complete(&mut self, dev: &OpenDevice<MdevDma>, outcome: &Outcome) {
        self.registers.complete(outcome);
        self.raise(dev, IRQ_COMMAND);
    }

    /// Queues the work, if there is anything to do and the device is running.
    fn queue_work(&self, dev: &OpenDevice<MdevDma>) {
        let work = self.queued.is_some() || self.generator.params().is_some();
        if work && self.running {
            dev.queue_work(0);
        }
    }

    /// Takes the queued command and the engine, to run it without the lock.
    fn begin(&mut self) -> Option<(Engine, Command)> {
        if !self.running || self.queued.is_none() {
            return None;
        }
        Some((self.engine.take()?, self.queued.take()?))
    }

    /// Has the generator write the pages that are due, and queues the work for the next ones.
    fn generate(&mut self, dev: &OpenDevice<MdevDma>, awaited: impl Fn() -> bool) {
        if !self.running || self.generator.params().is_none() {
            return;
        }
        let next = self.generator.run(dev, self.limits, &awaited);
        self.show_generator();
        match next {
            // Who waits looks once in a while.
            Some(delay) => dev.queue_work(if awaited() { delay.max(1) } else { delay }),
            None if dev.aborting() => (),
            None => self.raise(dev, IRQ_GENERATOR),
        }
    }

    fn show_generator(&mut self) {
        let running = self.generator.params().is_some();
        let (status, counter) = (self.generator.status(), self.generator.counter());
        self.registers.set_generator(running, status, counter);
    }

    /// Records an event, and interrupts if the event is enabled.
    fn raise(&mut self, dev: &OpenDevice<MdevDma>, irq: u32) {
        if self.registers.raise(irq) {
            dev.interrupts().send_msi(irq.trailing_zeros() as usize);
        }
        self.update_intx(dev);
    }

    /// Asserts or deasserts INTx after a change to anything it depends on.
    fn update_intx(&mut self, dev: &OpenDevice<MdevDma>) {
        let pending = self.registers.interrupt_pending();
        self.config_space.set_interrupt_status(pending);
        let asserted = pending && self.running && !self.config_space.intx_disabled();
        dev.interrupts().assert_intx(asserted);
    }
}

/// What a device has that others may not have.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    /// DMA logging.
    pub(crate) logging: bool,
}

#[vtable]
impl Operations for MdevDma {
    type OwnerModule = crate::LocalModule;
    type Iommu = Emulated;
    type Data = Kind;

    const NAME: &'static CStr = crate::NAME;

    fn parts(kind: &Kind) -> Parts<Self> {
        let parts = Parts::none()
            .with_migration()
            .with_pci_interrupts(config_space::MSI_VECTORS);
        if kind.logging {
            parts.with_logging()
        } else {
            parts
        }
    }

    fn open(_dev: &OpenDevice<Self>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- new_mutex!(Inner::new()?, "MdevDma::inner"),
            waiting: Atomic::new(0),
        })
    }

    fn info(self: Pin<&Self>, _dev: &OpenDevice<Self>) -> DeviceInfo {
        DeviceInfo {
            flags: VFIO_DEVICE_FLAGS_PCI,
            num_regions: VFIO_PCI_NUM_REGIONS,
        }
    }

    fn region_info(self: Pin<&Self>, _dev: &OpenDevice<Self>, index: u32) -> Result<RegionInfo> {
        let size = match index {
            VFIO_PCI_BAR0_REGION_INDEX => BAR_SIZE,
            VFIO_PCI_CONFIG_REGION_INDEX => config_space::SIZE,
            _ => 0,
        };
        let flags = match size {
            0 => 0,
            _ => VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
        };
        Ok(RegionInfo {
            flags,
            size: size as u64,
            offset: u64::from(index) << REGION_SHIFT,
        })
    }

    fn read(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        mut buf: UserSliceWriter,
        offset: u64,
    ) -> Result<usize> {
        let (region, offset) = Region::at(offset)?;
        match region {
            Region::ConfigSpace => {
                let mut bytes = [0; config_space::SIZE];
                let len = config_space_access(offset, buf.len())?;
                let bytes = bytes.get_mut(..len).ok_or(EINVAL)?;
                self.lock()?.config_space.read(offset, bytes);
                buf.write_slice(bytes)?;
                Ok(bytes.len())
            }
            Region::Bar0 => {
                let len = buf.len();
                check_bar_access(offset, len)?;
                let mut bytes = [0; registers::ACCESS];
                let value = bytes.get_mut(..len).ok_or(EINVAL)?;
                self.lock()?.read_bar(dev, offset, value);
                write_value(&mut buf, u64::from_le_bytes(bytes))?;
                Ok(len)
            }
        }
    }

    fn write(
        self: Pin<&Self>,
        dev: &OpenDevice<Self>,
        mut buf: UserSliceReader,
        offset: u64,
    ) -> Result<usize> {
        let (region, offset) = Region::at(offset)?;
        match region {
            Region::ConfigSpace => {
                let mut bytes = [0; config_space::SIZE];
                let len = config_space_access(offset, buf.len())?;
                let bytes = bytes.get_mut(..len).ok_or(EINVAL)?;
                buf.read_slice(bytes)?;
                let mut inner = self.lock()?;
                inner.config_space.write(offset, bytes);
                inner.update_intx(dev);
                Ok(bytes.len())
            }
            Region::Bar0 => {
                let len = buf.len();
                check_bar_access(offset, len)?;
                let bytes = read_value(&mut buf)?.to_le_bytes();
                // `get()` makes it 956 instructions a write, not 932 (`tools/vm/compare`).
                #[expect(clippy::indexing_slicing, reason = "`check_bar_access()` bounds it")]
                let value = &bytes[..len];
                self.lock()?.write_bar(dev, offset, value);
                Ok(len)
            }
        }
    }

    fn reset(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        // The generator holds `inner` while it writes, for as long as a page fault takes: so it ends
        // first.
        let stopped = dev.abort_work();
        let mut inner = self.inner.lock();
        dev.pins().unpin_all();
        inner.reset();
        drop(stopped);
        inner.resume(dev);
    }

    fn work(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        let mut inner = self.inner.lock();
        if let Some((mut engine, command)) = inner.begin() {
            drop(inner);
            let outcome = engine.run(dev, &command);
            dev.pins().release_reserved();
            inner = self.inner.lock();
            inner.engine = Some(engine);
            // After a reset there was no command, and so it doesn't interrupt.
            if !dev.aborting() {
                inner.complete(dev, &outcome);
            }
        }
        inner.generate(dev, || self.is_awaited());
    }
}

impl MigrationOperations for MdevDma {
    fn quiesce(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        let _stopped = dev.stop_work();
        let mut inner = self.inner.lock();
        inner.running = false;
        inner.update_intx(dev);
    }

    fn resume(self: Pin<&Self>, dev: &OpenDevice<Self>) {
        self.inner.lock().resume(dev);
    }

    fn save_identity(self: Pin<&Self>, stream: &mut KVVec<u8>) -> Result {
        migration::save_identity(stream)
    }

    fn save(self: Pin<&Self>, dev: &OpenDevice<Self>, stream: &mut KVVec<u8>) -> Result {
        migration::save(&mut *self.lock()?, dev, stream)
    }

    fn load(self: Pin<&Self>, dev: &OpenDevice<Self>, stream: &[u8]) -> Result<(), LoadError> {
        let mut inner = self.inner.lock();
        dev.pins().unpin_all();
        inner.reset();
        let restored = Saved::new(stream, inner.limits)
            .map_err(LoadError::Invalid)
            .and_then(|saved| saved.restore(&mut inner, dev));
        inner.update_intx(dev);
        restored
    }

    fn saved_size(self: Pin<&Self>, dev: &OpenDevice<Self>) -> usize {
        let pins = dev.pins();
        migration::size(pins.runs().count(), pins.raw().count())
    }

    fn max_saved_size(self: Pin<&Self>, _dev: &OpenDevice<Self>) -> usize {
        let pins = *module_parameters::max_pins.value_ref();
        // A run takes as much as a raw pin, and each has at least one pin.
        migration::size(1, usize::try_from(pins).unwrap_or(usize::MAX))
    }
}
