// SPDX-License-Identifier: GPL-2.0-only

//! Interrupts: which eventfds the device signals, and when.

use anyhow::{Context as _, Result, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, Skip, scenario};
use mdev_dma::{
    GeneratorConfig,
    uapi::{
        RUST_MDEV_DMA_GEN_DMA_RW as DMA_RW, RUST_MDEV_DMA_IRQ_COMMAND as COMMAND,
        RUST_MDEV_DMA_IRQ_GENERATOR as GENERATOR,
    },
};
use std::{
    os::fd::{AsFd, BorrowedFd},
    thread,
    time::Duration,
};
use testbed::fixture::{Fixture, LONG, succeeded};
use testbed::{PAGE, at, same, status};
use vfio_client::{
    EventFd, IrqData, SetIrqs,
    uapi::{
        VFIO_IRQ_SET_ACTION_MASK as MASK, VFIO_IRQ_SET_ACTION_TRIGGER as TRIGGER,
        VFIO_IRQ_SET_ACTION_UNMASK as UNMASK, VFIO_PCI_CONFIG_REGION_INDEX,
        VFIO_PCI_ERR_IRQ_INDEX as ERR, VFIO_PCI_INTX_IRQ_INDEX as INTX,
        VFIO_PCI_MSI_IRQ_INDEX as MSI, VFIO_PCI_MSIX_IRQ_INDEX as MSIX, VFIO_PCI_NUM_IRQS,
        VFIO_PCI_REQ_IRQ_INDEX as REQ,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/irq/intx",
        "INTx is a level: signalled once, and again when unmasked while asserted",
        intx,
    ),
    scenario(
        "device/irq/intx-disable",
        "the command register's INTx disable holds INTx back, the status bit shows it",
        intx_disable,
    ),
    scenario(
        "device/irq/intx-unmask-eventfd",
        "an eventfd that the user signals unmasks INTx, until it is taken away",
        intx_unmask_eventfd,
    ),
    scenario(
        "device/irq/intx-loop",
        "an eventfd that INTx signals and that unmasks it: the device goes on, and so does its end",
        intx_loop,
    ),
    scenario(
        "device/irq/msi",
        "MSI sends a message each time, on the vector of what happened or the only one",
        msi,
    ),
    scenario(
        "device/irq/ranges",
        "eventfds of some vectors are replaced and taken away, and triggered by the user",
        ranges,
    ),
    scenario(
        "device/irq/not-enabled",
        "what isn't enabled is noted, but interrupts nobody",
        not_enabled,
    ),
    scenario(
        "device/irq/one-at-a-time",
        "INTx and MSI exclude each other, until one is disabled",
        one_at_a_time,
    ),
    scenario("device/irq/reset", "RESET takes INTx down; the user's eventfds stay", reset),
    scenario("device/irq/close", "closing releases the eventfds", close),
    scenario(
        "device/irq/request",
        "removing a device that is open, and writes, signals REQ and waits until it is closed",
        request,
    ),
    scenario(
        "device/irq/bad-set",
        "invalid SET_IRQS fail as vfio-pci's do, and change nothing",
        bad_set,
    ),
];

/// What there are for interrupts of a device, with a page of memory.
struct Irqs {
    fixture: Fixture,
    config: u64,
}

impl Irqs {
    fn new(context: &Context<'_>) -> Result<Self> {
        let fixture = Fixture::new(context, 1)?;
        let info = fixture.device().device().region_info(VFIO_PCI_CONFIG_REGION_INDEX, None)?;
        fixture.device().enable_irqs(COMMAND | GENERATOR)?;
        Ok(Self { fixture, config: info.offset })
    }

    /// Makes a call, which is done if it is well-formed and fits.
    fn try_set(&self, action: u32, index: u32, start: u32, count: u32, data: IrqData<'_>) -> Call {
        let args = SetIrqs { index, action, start, count, data, argsz: None };
        status(self.fixture.device().device().set_irqs(&args))
    }

    fn set(
        &self,
        action: u32,
        index: u32,
        start: u32,
        count: u32,
        data: IrqData<'_>,
    ) -> Result<()> {
        let done = self.try_set(action, index, start, count, data)?;
        ensure!(done.is_ok(), "SET_IRQS {action:#x} of index {index}, {start}+{count}: {done:?}");
        Ok(())
    }

    /// Sets the eventfds of an index, from interrupt `start` on.
    fn set_eventfds(&self, index: u32, start: u32, eventfds: &[Option<&EventFd>]) -> Result<()> {
        let fds: Vec<Option<BorrowedFd<'_>>> =
            eventfds.iter().map(|eventfd| eventfd.map(AsFd::as_fd)).collect();
        self.set(TRIGGER, index, start, fds.len() as u32, IrqData::EventFd(&fds))
    }

    /// Disables an index.
    fn disable(&self, index: u32) -> Result<()> {
        self.set(TRIGGER, index, 0, 0, IrqData::None)
    }

    /// Has a command end.
    fn command(&self) -> Result<()> {
        succeeded("DMA_READ", self.fixture.device().dma_read(at(0, 0), 8)?)
    }

    /// Has the generator stop by itself.
    fn generator(&self) -> Result<()> {
        self.fixture.device().start_generator(&config())?;
        self.fixture.wait_for_generator().map(drop)
    }

    /// Writes the command register.
    fn write_command(&self, value: u16) -> Result<()> {
        self.fixture.device().device().write_at(self.config + 4, &value.to_le_bytes())?;
        Ok(())
    }

    /// Whether configuration space shows an interrupt.
    fn shown(&self) -> Result<bool> {
        let mut bytes = [0; 2];
        self.fixture.device().device().read_at(self.config + 6, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes) & 0x8 != 0)
    }
}

/// One write to page 0.
fn config() -> GeneratorConfig {
    GeneratorConfig { iova: at(0, 0), length: PAGE, seed: 1, limit: 1, rate: 0, mode: DMA_RW }
}

type Call = Result<Result<(), Errno>>;

/// Fails unless an eventfd was signalled so often.
fn signalled(what: &str, expected: u64, eventfd: &EventFd) -> Result<()> {
    same(&format!("number of signals {what}"), expected, eventfd.take()?)
}

fn intx(context: &Context<'_>) -> Result<()> {
    let irqs = Irqs::new(context)?;
    let (device, eventfd) = (irqs.fixture.device(), EventFd::new()?);
    let unmask = || irqs.set(UNMASK, INTX, 0, 1, IrqData::None);
    irqs.set_eventfds(INTX, 0, &[Some(&eventfd)])?;
    signalled("before anything happened", 0, &eventfd)?;
    irqs.command()?;
    signalled("after a command", 1, &eventfd)?;
    ensure!(irqs.shown()?, "configuration space shows no interrupt");
    irqs.command()?;
    signalled("after another, while masked", 0, &eventfd)?;
    unmask()?;
    signalled("unmasked while asserted", 1, &eventfd)?;
    device.clear_irqs(COMMAND)?;
    ensure!(!irqs.shown()?, "configuration space still shows an interrupt");
    unmask()?;
    signalled("unmasked after it was cleared", 0, &eventfd)?;
    irqs.command()?;
    signalled("after one more command", 1, &eventfd)?;
    device.clear_irqs(COMMAND)?;
    unmask()?;

    irqs.set(MASK, INTX, 0, 1, IrqData::Bool(&[false]))?;
    irqs.command()?;
    signalled("after a MASK that says no", 1, &eventfd)?;
    device.clear_irqs(COMMAND)?;
    unmask()?;
    irqs.set(MASK, INTX, 0, 1, IrqData::Bool(&[true]))?;
    irqs.command()?;
    signalled("masked by the user", 0, &eventfd)?;
    irqs.set(UNMASK, INTX, 0, 1, IrqData::Bool(&[false]))?;
    signalled("after an UNMASK that says no", 0, &eventfd)?;
    irqs.set(UNMASK, INTX, 0, 1, IrqData::Bool(&[true]))?;
    signalled("unmasked by the user", 1, &eventfd)?;

    irqs.disable(INTX)?;
    let other = EventFd::new()?;
    irqs.set_eventfds(INTX, 0, &[Some(&other)])?;
    signalled("enabled while asserted", 1, &other)?;
    signalled("of what is set no more", 0, &eventfd)
}

fn intx_disable(context: &Context<'_>) -> Result<()> {
    let irqs = Irqs::new(context)?;
    let eventfd = EventFd::new()?;
    irqs.set_eventfds(INTX, 0, &[Some(&eventfd)])?;
    irqs.write_command(0x400)?;
    irqs.command()?;
    signalled("while INTx is disabled", 0, &eventfd)?;
    ensure!(irqs.shown()?, "configuration space shows no interrupt");
    irqs.write_command(0)?;
    signalled("once it isn't", 1, &eventfd)
}

/// Unmasking INTx while it is asserted signals it, which unmasks it: a worker is busy with that until INTx
/// is deasserted, or the device is closed.
fn intx_loop(context: &Context<'_>) -> Result<()> {
    let mut irqs = Irqs::new(context)?;
    let eventfd = EventFd::new()?;
    for closes in [false, true] {
        irqs.set_eventfds(INTX, 0, &[Some(&eventfd)])?;
        let set = irqs.try_set(UNMASK, INTX, 0, 1, IrqData::EventFd(&[Some(eventfd.as_fd())]))?;
        if set == Err(Errno::ENOTTY) {
            return Err(Skip("this kernel has no CONFIG_VFIO_VIRQFD".into()).into());
        }
        ensure!(set.is_ok(), "UNMASK by the trigger: {set:?}");
        for _ in 0..100 {
            irqs.command()?;
        }
        if closes {
            irqs.fixture.close();
        } else {
            irqs.fixture.device().clear_irqs(COMMAND)?;
            irqs.disable(INTX)?;
            irqs.command()?;
        }
        // What was under way has ended.
        eventfd.take()?;
        thread::sleep(Duration::from_millis(20));
        signalled("once INTx is disabled, or its device closed", 0, &eventfd)?;
    }
    Ok(())
}

fn intx_unmask_eventfd(context: &Context<'_>) -> Result<()> {
    const A_WHILE: Duration = Duration::from_millis(20);
    let mut irqs = Irqs::new(context)?;
    let [eventfd, unmask, other] = [EventFd::new()?, EventFd::new()?, EventFd::new()?];
    let set = |irqs: &Irqs, fd: Option<&EventFd>| {
        irqs.try_set(UNMASK, INTX, 0, 1, IrqData::EventFd(&[fd.map(AsFd::as_fd)]))
    };
    irqs.set_eventfds(INTX, 0, &[Some(&eventfd)])?;
    let set_first = set(&irqs, Some(&unmask))?;
    if set_first == Err(Errno::ENOTTY) {
        return Err(Skip("this kernel has no CONFIG_VFIO_VIRQFD".into()).into());
    }
    ensure!(set_first.is_ok(), "UNMASK by eventfd: {set_first:?}");
    let again = set(&irqs, Some(&other))?;
    ensure!(again == Err(Errno::EBUSY), "by another as well: {again:?}");

    irqs.command()?;
    signalled("after a command", 1, &eventfd)?;
    unmask.signal()?;
    same("signals, unmasked while asserted", 1, eventfd.wait(LONG)?)?;
    irqs.fixture.device().clear_irqs(COMMAND)?;
    unmask.signal()?;
    thread::sleep(A_WHILE);
    signalled("unmasked after it was cleared", 0, &eventfd)?;
    irqs.command()?;
    signalled("after one more command", 1, &eventfd)?;
    ensure!(set(&irqs, None)?.is_ok(), "taking it away");
    unmask.signal()?;
    thread::sleep(A_WHILE);
    signalled("after it was taken away", 0, &eventfd)?;

    // It ends with INTx, with the device, and when it is closed itself.
    ensure!(set(&irqs, Some(&other))?.is_ok(), "another");
    irqs.disable(INTX)?;
    irqs.set_eventfds(INTX, 0, &[Some(&eventfd)])?;
    signalled("of INTx, enabled again while asserted", 1, &eventfd)?;
    other.signal()?;
    thread::sleep(A_WHILE);
    signalled("of what ended with INTx", 0, &eventfd)?;
    ensure!(set(&irqs, Some(&other))?.is_ok(), "the other again");
    drop(other);
    ensure!(set(&irqs, Some(&unmask))?.is_ok(), "one more, once the other was closed");
    irqs.fixture.close();
    unmask.signal()?;
    irqs.fixture.open()
}

fn msi(context: &Context<'_>) -> Result<()> {
    let irqs = Irqs::new(context)?;
    let (first, second) = (EventFd::new()?, EventFd::new()?);
    irqs.set_eventfds(MSI, 0, &[Some(&first), Some(&second)])?;
    for _ in 0..3 {
        irqs.command()?;
        signalled("of vector 0 after a command", 1, &first)?;
        signalled("of vector 1 after a command", 0, &second)?;
    }
    irqs.generator()?;
    same("signals of vector 1, the generator's", 1, second.wait(LONG)?)?;
    signalled("of vector 0 after the generator", 0, &first)?;

    irqs.disable(MSI)?;
    irqs.command()?;
    signalled("while disabled", 0, &first)?;
    irqs.set_eventfds(MSI, 0, &[Some(&first)])?;
    irqs.generator()?;
    same("signals of the only vector", 1, first.wait(LONG)?)?;
    let status = irqs.fixture.device().irq_status()?;
    same("IRQ_STATUS", (COMMAND | GENERATOR).into(), status.into())
}

fn ranges(context: &Context<'_>) -> Result<()> {
    let irqs = Irqs::new(context)?;
    let [first, second, third] = [EventFd::new()?, EventFd::new()?, EventFd::new()?];
    irqs.set_eventfds(MSI, 1, &[Some(&second)])?;
    irqs.command()?;
    irqs.set(TRIGGER, MSI, 0, 2, IrqData::None)?;
    signalled("of vector 1, the only one with an eventfd", 1, &second)?;

    irqs.set_eventfds(MSI, 0, &[Some(&first)])?;
    irqs.set(TRIGGER, MSI, 0, 2, IrqData::Bool(&[true, false]))?;
    signalled("of vector 0, to which BOOL says yes", 1, &first)?;
    signalled("of vector 1, to which it says no", 0, &second)?;
    irqs.set_eventfds(MSI, 1, &[Some(&third)])?;
    irqs.set(TRIGGER, MSI, 1, 1, IrqData::None)?;
    signalled("of what was replaced", 0, &second)?;
    signalled("of what replaced it", 1, &third)?;
    irqs.set_eventfds(MSI, 0, &[None])?;
    irqs.set(TRIGGER, MSI, 0, 2, IrqData::None)?;
    irqs.command()?;
    signalled("of what was taken away", 0, &first)?;
    signalled("of what stays", 1, &third)?;

    irqs.disable(MSI)?;
    irqs.set_eventfds(INTX, 0, &[Some(&first)])?;
    irqs.fixture.device().clear_irqs(COMMAND)?;
    signalled("of INTx, asserted when it was enabled", 1, &first)?;
    irqs.set(TRIGGER, INTX, 0, 1, IrqData::None)?;
    signalled("of INTx by the user", 1, &first)?;
    for index in [ERR, REQ] {
        irqs.set_eventfds(index, 0, &[Some(&second)])?;
        irqs.set(TRIGGER, index, 0, 1, IrqData::None)?;
        irqs.set(TRIGGER, index, 0, 1, IrqData::Bool(&[true]))?;
        irqs.set(TRIGGER, index, 0, 1, IrqData::Bool(&[false]))?;
        signalled(&format!("of index {index} by the user"), 2, &second)?;
        irqs.disable(index)?;
        let again = irqs.try_set(TRIGGER, index, 0, 1, IrqData::None)?;
        ensure!(again == Err(Errno::EINVAL), "triggering index {index}, disabled: {again:?}");
    }
    Ok(())
}

fn not_enabled(context: &Context<'_>) -> Result<()> {
    let irqs = Irqs::new(context)?;
    let (device, eventfd) = (irqs.fixture.device(), EventFd::new()?);
    device.enable_irqs(GENERATOR)?;
    for index in [INTX, MSI] {
        irqs.set_eventfds(index, 0, &[Some(&eventfd)])?;
        irqs.command()?;
        signalled("of what isn't enabled", 0, &eventfd)?;
        same("IRQ_STATUS", COMMAND.into(), device.irq_status()?.into())?;
        ensure!(!irqs.shown()?, "configuration space shows an interrupt");
        device.clear_irqs(!COMMAND)?;
        same("IRQ_STATUS, other bits cleared", COMMAND.into(), device.irq_status()?.into())?;
        device.clear_irqs(COMMAND)?;
        same("IRQ_STATUS, cleared", 0, device.irq_status()?.into())?;
        irqs.disable(index)?;
    }
    irqs.command()?;
    irqs.set_eventfds(INTX, 0, &[Some(&eventfd)])?;
    device.enable_irqs(COMMAND)?;
    signalled("of INTx, enabled when its bit was set already", 1, &eventfd)
}

fn one_at_a_time(context: &Context<'_>) -> Result<()> {
    let irqs = Irqs::new(context)?;
    let eventfd = EventFd::new()?;
    let fds = [Some(eventfd.as_fd())];
    for (one, other) in [(INTX, MSI), (MSI, INTX)] {
        irqs.set_eventfds(one, 0, &[Some(&eventfd)])?;
        let both = irqs.try_set(TRIGGER, other, 0, 1, IrqData::EventFd(&fds))?;
        ensure!(both == Err(Errno::EINVAL), "{other} while {one} is enabled: {both:?}");
        let disabled = irqs.try_set(TRIGGER, other, 0, 0, IrqData::None)?;
        ensure!(disabled == Err(Errno::EINVAL), "disabling {other}, which isn't: {disabled:?}");
        irqs.command()?;
        signalled("of the one that is enabled", 1, &eventfd)?;
        irqs.fixture.device().clear_irqs(COMMAND)?;
        irqs.disable(one)?;
    }
    Ok(())
}

fn reset(context: &Context<'_>) -> Result<()> {
    let irqs = Irqs::new(context)?;
    let (device, eventfd) = (irqs.fixture.device(), EventFd::new()?);
    irqs.set_eventfds(INTX, 0, &[Some(&eventfd)])?;
    irqs.command()?;
    signalled("before RESET", 1, &eventfd)?;
    device.device().reset()?;
    ensure!(!irqs.shown()?, "configuration space still shows an interrupt");
    same("IRQ_STATUS", 0, device.irq_status()?.into())?;
    irqs.set(UNMASK, INTX, 0, 1, IrqData::None)?;
    irqs.command()?;
    signalled("after RESET, which enables nothing", 0, &eventfd)?;
    device.enable_irqs(COMMAND)?;
    signalled("after it was enabled again", 1, &eventfd)
}

fn close(context: &Context<'_>) -> Result<()> {
    let mut irqs = Irqs::new(context)?;
    let eventfd = EventFd::new()?;
    irqs.set_eventfds(MSI, 0, &[Some(&eventfd)])?;
    irqs.fixture.close();
    irqs.fixture.open()?;
    irqs.fixture.device().enable_irqs(COMMAND)?;
    irqs.command()?;
    signalled("after closing and opening", 0, &eventfd)?;
    irqs.set_eventfds(INTX, 0, &[Some(&eventfd)])?;
    signalled("of INTx, which can be enabled", 1, &eventfd)
}

fn request(context: &Context<'_>) -> Result<()> {
    let mdev = context.device(1)?;
    let fixture = Fixture::without_mapping(context, 1, 1)?;
    let eventfd = EventFd::new()?;
    let fds = [Some(eventfd.as_fd())];
    fixture.device().device().set_irqs(&SetIrqs {
        index: REQ,
        action: TRIGGER,
        start: 0,
        count: 1,
        data: IrqData::EventFd(&fds),
        argsz: None,
    })?;
    fixture.map(0..1)?;
    fixture.device().start_generator(&GeneratorConfig { limit: 0, ..config() })?;
    let removal = thread::spawn(move || mdev.remove());
    let signals = eventfd.wait(LONG)?;
    ensure!(signals > 0, "REQ wasn't signalled");
    fixture.wait_for_writes(100)?;
    ensure!(!removal.is_finished(), "it was removed while it was open");
    drop(fixture);
    removal.join().ok().context("the thread panicked")??;
    ensure!(!mdev.exists(), "{} is still there", mdev.path().display());
    Ok(())
}

fn bad_set(context: &Context<'_>) -> Result<()> {
    let irqs = Irqs::new(context)?;
    let (good, bad) = (EventFd::new()?, EventFd::new()?);
    let file = std::fs::File::open("/dev/null")?;
    irqs.set_eventfds(MSI, 0, &[Some(&good), Some(&good)])?;
    let one = [Some(bad.as_fd())];
    let (fds, broken) = ([one[0]; 3], [one[0], Some(file.as_fd())]);
    let (fds, broken) = (IrqData::EventFd(&fds), IrqData::EventFd(&broken));
    let fd = IrqData::EventFd(&one);
    let (none, bools) = (IrqData::None, IrqData::Bool(&[true; 3]));
    for (errno, action, index, start, count, data) in [
        // No such interrupts.
        (Errno::EINVAL, TRIGGER, VFIO_PCI_NUM_IRQS, 0, 1, none),
        (Errno::EINVAL, TRIGGER, u32::MAX, 0, 1, none),
        (Errno::EINVAL, TRIGGER, MSIX, 0, 0, none),
        (Errno::EINVAL, TRIGGER, MSI, 2, 0, none),
        (Errno::EINVAL, TRIGGER, MSI, 1, 2, fds),
        (Errno::EINVAL, TRIGGER, MSI, 0, 3, fds),
        (Errno::EINVAL, TRIGGER, MSI, u32::MAX, 1, none),
        (Errno::EINVAL, TRIGGER, MSI, 1, u32::MAX, bools),
        (Errno::EINVAL, TRIGGER, INTX, 0, 2, fds),
        (Errno::EINVAL, TRIGGER, ERR, 1, 1, fds),
        (Errno::EINVAL, TRIGGER, REQ, 0, 2, fds),
        // Not enabled.
        (Errno::EINVAL, MASK, INTX, 0, 1, none),
        (Errno::EINVAL, UNMASK, INTX, 0, 1, none),
        (Errno::EINVAL, UNMASK, INTX, 0, 1, fd),
        (Errno::EINVAL, TRIGGER, INTX, 0, 1, none),
        (Errno::EINVAL, TRIGGER, ERR, 0, 1, none),
        (Errno::EINVAL, TRIGGER, REQ, 0, 0, none),
        (Errno::EINVAL, TRIGGER, ERR, 0, 0, fds),
        // Not there is.
        (Errno::ENOTTY, MASK, MSI, 0, 1, none),
        (Errno::ENOTTY, UNMASK, MSI, 0, 1, none),
        (Errno::ENOTTY, MASK, ERR, 0, 1, none),
        (Errno::ENOTTY, 0, MSI, 0, 1, none),
        (Errno::ENOTTY, MASK | TRIGGER, INTX, 0, 1, none),
        // Flags that there aren't, and two kinds of data.
        (Errno::EINVAL, TRIGGER | (1 << 6), MSI, 0, 1, none),
        (Errno::EINVAL, TRIGGER | (1 << 1), MSI, 0, 1, none),
        // No eventfd.
        (Errno::EINVAL, TRIGGER, MSI, 0, 2, broken),
    ] {
        let found = irqs.try_set(action, index, start, count, data)?;
        ensure!(
            found == Err(errno),
            "action {action:#x}, index {index}, {start}+{count}, {data:?}: {found:?}, not {errno}"
        );
    }
    for argsz in [0, 19, 20, 23] {
        let data = IrqData::EventFd(&one);
        let args =
            SetIrqs { index: MSI, action: TRIGGER, start: 0, count: 1, data, argsz: Some(argsz) };
        let found = status(irqs.fixture.device().device().set_irqs(&args))?;
        ensure!(found == Err(Errno::EINVAL), "argsz {argsz}: {found:?}");
    }
    irqs.command()?;
    irqs.set(TRIGGER, MSI, 1, 1, IrqData::None)?;
    signalled("of what was set before", 2, &good)?;
    signalled("of what was never set", 0, &bad)?;
    irqs.disable(MSI)?;
    irqs.fixture.device().clear_irqs(COMMAND)?;
    bad_set_of_enabled_intx(&irqs)
}

fn bad_set_of_enabled_intx(irqs: &Irqs) -> Result<()> {
    let (good, bad) = (EventFd::new()?, EventFd::new()?);
    irqs.set_eventfds(INTX, 0, &[Some(&good)])?;
    let found = irqs.try_set(MASK, INTX, 0, 1, IrqData::EventFd(&[Some(bad.as_fd())]))?;
    ensure!(found == Err(Errno::ENOTTY), "MASK by eventfd: {found:?}");
    for action in [MASK, UNMASK] {
        let found = irqs.try_set(action, INTX, 0, 0, IrqData::None)?;
        ensure!(found == Err(Errno::EINVAL), "of nothing, {action:#x}: {found:?}");
    }
    irqs.command()?;
    signalled("of INTx, which isn't masked", 1, &good)
}
