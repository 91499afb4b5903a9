// SPDX-License-Identifier: GPL-2.0-only

//! Migration of the device: its states, the stream of its state, and that it is quiesced.

use crate::stream::{changed, field, long, quad};
use anyhow::{Context as _, Result, ensure};
use dirty_model::Errno;
use harness::{Context, Scenario, scenario};
use mdev_dma::{
    GeneratorConfig, IN_PROGRESS, Opcode, Width, pattern,
    uapi::{
        self, RUST_MDEV_DMA_GEN_DMA_RW as DMA_RW, RUST_MDEV_DMA_GEN_PIN as PIN,
        RUST_MDEV_DMA_GEN_PINNED as PINNED, RUST_MDEV_DMA_IRQ_COMMAND as COMMAND,
    },
};
use std::{thread, time::Duration};
use testbed::fixture::{Fixture, LONG, is_awaited, stopped_with, succeeded};
use testbed::{PAGE, at, same, status};
use vfio_client::{
    Access, DataFile, EventFd, Memory,
    MigState::{self, PreCopy, PreCopyP2p, Resuming, Running, RunningP2p, Stop, StopCopy},
    uapi::{
        VFIO_MIGRATION_P2P, VFIO_MIGRATION_PRE_COPY, VFIO_MIGRATION_STOP_COPY,
        VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX,
    },
};

pub const SCENARIOS: &[Scenario] = &[
    scenario(
        "device/migration-state/states",
        "from each state to each: it gets there or is refused, and data files come and go",
        states,
    ),
    scenario(
        "device/migration-state/stop",
        "in RUNNING the generator changes memory, in P2P states and STOP nothing does",
        stop,
    ),
    scenario(
        "device/migration-state/stop-waits",
        "quiescing waits for a command in the background; one written then is queued",
        stop_waits,
    ),
    scenario(
        "device/migration-state/state",
        "registers, configuration space, pins, generator and command arrive as they were",
        state,
    ),
    scenario(
        "device/migration-state/interrupt",
        "an interrupt that was pending is raised where the device goes on",
        interrupt,
    ),
    scenario(
        "device/migration-state/pre-copy",
        "PRE_COPY has data to read and tells its size, then ENOMSG, then the state",
        pre_copy,
    ),
    scenario(
        "device/migration-state/chunks",
        "the stream is the same however it is read and written",
        chunks,
    ),
    scenario(
        "device/migration-state/bad-buffer",
        "what could not be copied from or to the user is neither lost nor taken",
        bad_buffer,
    ),
    scenario(
        "device/migration-state/bad-stream",
        "a stream cut short or changed anywhere is EINVAL and ERROR, RESET mends that",
        bad_stream,
    ),
    scenario(
        "device/migration-state/bad-state",
        "invalid states whose checksum is right are EINVAL and ERROR",
        bad_state,
    ),
    scenario(
        "device/migration-state/pins-not-mapped",
        "pins of memory that isn't mapped fail as PIN does, none is left, and it can be tried again",
        pins_not_mapped,
    ),
    scenario(
        "device/migration-state/ended-file",
        "a data file outlives its use, the device and its memory, and answers ENODEV",
        ended_file,
    ),
];

/// The generator's window begins at page 0, and has so many pages.
const WINDOW: u64 = 200;

/// Pages of memory.
const PAGES: u64 = 300;

fn config(mode: u32) -> GeneratorConfig {
    GeneratorConfig { iova: at(0, 0), length: WINDOW * PAGE, seed: 77, limit: 0, rate: 0, mode }
}

/// Brings a device to a state without a data file.
pub(crate) fn set(fixture: &Fixture, state: MigState) -> Result<()> {
    let file = fixture.device().device().set_migration_state(state)?;
    ensure!(file.is_none(), "{state} came with a data file");
    is_in(fixture, state)
}

/// Brings a device to a state with a data file.
pub(crate) fn begin(fixture: &Fixture, state: MigState) -> Result<DataFile> {
    let file = fixture.device().device().set_migration_state(state)?;
    is_in(fixture, state)?;
    file.with_context(|| format!("{state} came without a data file"))
}

fn is_in(fixture: &Fixture, state: MigState) -> Result<()> {
    let found = fixture.device().device().migration_state()?;
    ensure!(found == state, "the state is {found}, not {state}");
    Ok(())
}

/// Stops a device, and reads its state.
pub(crate) fn save(fixture: &Fixture) -> Result<Vec<u8>> {
    let size = fixture.device().device().migration_data_size()?;
    let stream = begin(fixture, StopCopy)?.read_to_end(1 << 16)?;
    same("bytes of the stream", size, stream.len() as u64)?;
    Ok(stream)
}

/// Writes all of a stream.
pub(crate) fn write(file: &DataFile, stream: &[u8]) -> Result<()> {
    same("bytes written", stream.len() as u64, file.write(stream)? as u64)
}

/// Has a device take over a state, up to STOP.
pub(crate) fn load(fixture: &Fixture, stream: &[u8]) -> Result<()> {
    write(&begin(fixture, Resuming)?, stream)?;
    set(fixture, Stop)
}

/// Has a device take over a stream, which must fail with `errno` and leave nothing behind.
pub(crate) fn fails(fixture: &Fixture, what: &str, errno: Errno, stream: &[u8]) -> Result<()> {
    write(&begin(fixture, Resuming)?, stream)?;
    let found = status(fixture.device().device().set_migration_state(Running))?.map(drop);
    ensure!(found == Err(errno), "{what}: {found:?}, not {errno}");
    is_in(fixture, MigState::Error)?;
    for state in MigState::ALL.into_iter().filter(|&state| state != MigState::Error) {
        let found = status(fixture.device().device().set_migration_state(state))?.map(drop);
        ensure!(found == Err(Errno::EINVAL), "from ERROR to {state}: {found:?}");
    }
    same("PINS", 0, fixture.device().pins()?)?;
    stopped_with(fixture.device().generator()?, 0, 0)?;
    same("SEED", 0, fixture.device().read(uapi::RUST_MDEV_DMA_REG_SEED, Width::Quad)?)?;
    fixture.device().device().reset()?;
    is_in(fixture, Running)?;
    succeeded("DMA_READ", fixture.device().dma_read(at(0, 0), PAGE)?)
}

/// Has a device take over a stream that asks for what it can't have now: the transition must fail with
/// `errno`, leave nothing behind, and be there to be tried again. Still in RESUMING then.
pub(crate) fn not_yet(fixture: &Fixture, what: &str, errno: Errno, stream: &[u8]) -> Result<()> {
    write(&begin(fixture, Resuming)?, stream)?;
    for _ in 0..2 {
        let found = status(fixture.device().device().set_migration_state(Running))?.map(drop);
        ensure!(found == Err(errno), "{what}: {found:?}, not {errno}");
        is_in(fixture, Resuming)?;
        same("PINS", 0, fixture.device().pins()?)?;
    }
    Ok(())
}

fn states(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, 1)?;
    let device = fixture.device().device();
    let flags = VFIO_MIGRATION_STOP_COPY | VFIO_MIGRATION_PRE_COPY | VFIO_MIGRATION_P2P;
    same("migration flags", flags.into(), device.migration_flags()?)?;
    is_in(&fixture, Running)?;
    let stream = save(&fixture)?;
    device.reset()?;
    let saving = [PreCopy, PreCopyP2p, StopCopy];
    let states = MigState::ALL.into_iter().filter(|&state| state != MigState::Error);
    for from in states.clone() {
        for to in states.clone() {
            let before = device.set_migration_state(from)?;
            if from == Resuming {
                write(before.as_ref().context("no data file")?, &stream)?;
            }
            let what = format!("from {from} to {to}");
            let found = status(device.set_migration_state(to))?;
            if from == StopCopy && matches!(to, PreCopy | PreCopyP2p) {
                ensure!(found.as_ref().err() == Some(&Errno::EINVAL), "{what}: {found:?}");
                is_in(&fixture, StopCopy)?;
            } else {
                is_in(&fixture, to)?;
                let Ok(after) = found else { anyhow::bail!("{what}: {found:?}") };
                let same_session = from == to || saving.contains(&from) && saving.contains(&to);
                let has_data = to == Resuming || saving.contains(&to);
                ensure!(after.is_some() == (has_data && !same_session), "{what}: {after:?}");
                if let Some(after) = &after {
                    let (reads, writes) = after.access()?;
                    ensure!(writes == (to == Resuming) && reads != writes, "{what}: access");
                }
            }
            device.reset()?;
            is_in(&fixture, Running)?;
        }
    }
    for number in [0, 8, 99, u32::MAX] {
        let found = status(device.set_migration_state_number(number))?.map(drop);
        ensure!(found == Err(Errno::EINVAL), "state {number}: {found:?}");
        is_in(&fixture, Running)?;
    }
    Ok(())
}

fn stop(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    fixture.pin(0..WINDOW)?;
    let config = config(PINNED | DMA_RW | PIN);
    fixture.device().start_generator(&config)?;
    let changes = || -> Result<()> {
        let before = fixture.copy();
        fixture.wait_for_writes(1)?;
        ensure!(fixture.copy() != before, "memory stays as it is, although the device runs");
        Ok(())
    };
    let still = || -> Result<u64> {
        let first = fixture.device().generator()?;
        same("GEN_STATUS", IN_PROGRESS.into(), first.status.into())?;
        fixture.is_quiesced()?;
        ensure!(fixture.device().generator()? == first, "the counter goes on");
        fixture.has_generated(&config, first.counter)?;
        Ok(first.counter)
    };
    changes()?;
    let mut counter = 0;
    for state in [RunningP2p, Stop, StopCopy, PreCopyP2p] {
        drop(fixture.device().device().set_migration_state(Running)?);
        changes()?;
        drop(fixture.device().device().set_migration_state(state)?);
        let now = still()?;
        ensure!(now > counter, "it went on from {counter} to {now}");
        counter = now;
    }
    drop(fixture.device().device().set_migration_state(PreCopy)?);
    changes()
}

fn stop_waits(context: &Context<'_>) -> Result<()> {
    const MANY: u64 = 1 << 13;
    let fixture = Fixture::new(context, MANY)?;
    let device = fixture.device();
    let waits = fixture.unserved_last_page()?;
    device.run_in_background(Opcode::DmaWrite, at(0, 0), MANY * PAGE, 1)?;
    is_awaited(&waits)?;
    same("STATUS", IN_PROGRESS.into(), device.outcome()?.status.into())?;
    // Only some time after the device has begun to leave RUNNING can the command end.
    let served = waits.serve(Duration::from_millis(20));
    set(&fixture, RunningP2p)?;
    let outcome = device.outcome()?;
    drop(served);
    succeeded("DMA_WRITE", outcome)?;
    same("COUNT", MANY * PAGE, outcome.count)?;
    fixture.is_quiesced()?;

    for state in [RunningP2p, Stop] {
        set(&fixture, state)?;
        let before = fixture.page(5);
        for background in [0, uapi::RUST_MDEV_DMA_COMMAND_BACKGROUND] {
            let op = Opcode::DmaWrite as u32 | background;
            let outcome = device.run(op, at(5, 0), PAGE, 8 + state as u64)?;
            same("STATUS of what waits", IN_PROGRESS.into(), outcome.status.into())?;
            same("REFUSED", u64::from(background != 0), device.refused()?.into())?;
        }
        fixture.is_quiesced()?;
        ensure!(fixture.page(5) == before, "it was written in {state}");
        set(&fixture, Running)?;
        succeeded("DMA_WRITE", device.wait(LONG)?)?;
        ensure!(fixture.page(5) != before, "it wasn't written");
    }
    Ok(())
}

/// The bytes of a device's configuration space and registers, but those that only its driver knows.
fn visible(fixture: &Fixture) -> Result<Vec<u8>> {
    let mut bytes = vec![0; 256];
    let device = fixture.device();
    let config = device.device().region_info(VFIO_PCI_CONFIG_REGION_INDEX, None)?.offset;
    device.device().read_at(config, &mut bytes)?;
    for register in (0..uapi::RUST_MDEV_DMA_BAR_SIZE).step_by(8) {
        bytes.extend(device.read(register, Width::Quad)?.to_le_bytes());
    }
    Ok(bytes)
}

fn state(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    let device = fixture.device();
    let config_space = device.device().region_info(VFIO_PCI_CONFIG_REGION_INDEX, None)?.offset;
    for (offset, value) in [(0x04, 0x0406), (0x10, 0xfebf_0000), (0x3c, 11), (0x44, 0xfee0_0000)] {
        let value: u32 = value;
        device.device().write_at(config_space + offset, &value.to_le_bytes())?;
    }
    // Pins of different counts, in several blocks.
    fixture.pin(0..WINDOW)?;
    fixture.pin(50..150)?;
    fixture.pin(60..61)?;
    fixture.pin(PAGES - 1..PAGES)?;
    device.enable_irqs(COMMAND)?;
    succeeded("DMA_READ", device.dma_read(at(3, 1), 5 * PAGE)?)?;
    let config = config(PINNED | DMA_RW);
    device.start_generator(&config)?;
    fixture.wait_for_writes(WINDOW / 2)?;
    set(&fixture, Stop)?;
    device.run(Opcode::DmaWrite as u32, at(WINDOW, 0), PAGE, 5)?;

    let (seen, stream) = (visible(&fixture)?, save(&fixture)?);
    let counter = device.generator()?.counter;
    fixture.has_generated(&config, counter)?;

    // Another device, whose memory has the same contents at another place.
    let other = Fixture::without_mapping(context, 1, PAGES)?;
    other.memory.write(0, &fixture.copy());
    other.map(0..PAGES)?;
    load(&other, &stream)?;
    let found = visible(&other)?;
    let differs = (0..seen.len()).find(|&i| seen[i] != found[i]);
    ensure!(differs.is_none(), "byte {differs:x?} of configuration space and registers differs");
    same("PINS", WINDOW + 100 + 1 + 1, other.device().pins()?)?;
    other.is_quiesced()?;
    ensure!(save(&other)? == stream, "saved again, the state is another");

    // It goes on from where it was, the first one stays quiesced.
    set(&other, Running)?;
    succeeded("DMA_WRITE", other.device().wait(LONG)?)?;
    other.wait_for_writes(WINDOW + 10)?;
    let stopped = other.device().stop_generator()?;
    ensure!(stopped.counter > counter + WINDOW, "{stopped:?}, it was at {counter}");
    let memory = other.copy();
    let window = (WINDOW * PAGE) as usize;
    testbed::fixture::check_generated(&memory[..window], &config, stopped.counter)?;
    let mut expected = vec![0; PAGE as usize];
    pattern::fill(&mut expected, 5, at(WINDOW, 0));
    ensure!(other.page(WINDOW) == expected, "the command that waited wrote something else");
    fixture.is_quiesced()?;
    has_pins_of_state(&other)
}

/// Unpins what the state of [`state`] has, which must be that and no more.
fn has_pins_of_state(other: &Fixture) -> Result<()> {
    for (pages, times) in [(0..50, 1), (50..60, 2), (60..61, 3), (PAGES - 1..PAGES, 1)] {
        let (iova, length) = (at(pages.start, 0), (pages.end - pages.start) * PAGE);
        for _ in 0..times {
            succeeded("UNPIN", other.device().unpin(iova, length)?)?;
        }
        let again = other.device().unpin(iova, length)?.status;
        same("UNPIN once more", Errno::ENXIO.0 as u64, again.into())?;
    }
    Ok(())
}

fn interrupt(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, 1)?;
    fixture.device().enable_irqs(COMMAND)?;
    succeeded("DMA_READ", fixture.device().dma_read(at(0, 0), 8)?)?;
    let stream = save(&fixture)?;

    let (other, eventfd) = (Fixture::without_mapping(context, 1, 1)?, EventFd::new()?);
    other.device().device().set_trigger(VFIO_PCI_INTX_IRQ_INDEX, &eventfd)?;
    load(&other, &stream)?;
    thread::sleep(Duration::from_millis(10));
    same("interrupts while it is quiesced", 0, eventfd.take()?)?;
    set(&other, Running)?;
    same("interrupts once it runs", 1, eventfd.wait(LONG)?)
}

/// Fails unless more has yet to come.
fn has_nothing_to_read(file: &DataFile, when: &str) -> Result<()> {
    let found = status(file.read(&mut [0; 10]))?;
    ensure!(found == Err(Errno::ENOMSG), "{when}: {found:?}, not ENOMSG");
    ensure!(!file.is_readable()?, "{when}: poll says that there is something to read");
    Ok(())
}

fn pre_copy(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    fixture.pin(0..10)?;
    let config = config(DMA_RW);
    fixture.device().start_generator(&config)?;
    let file = begin(&fixture, PreCopy)?;
    let info = file.precopy_info(None)?;
    ensure!(info.initial_bytes > 0 && info.dirty_bytes == 0, "{info:?}");
    ensure!(file.is_readable()?, "there is something to read, but poll says no");
    let mut stream = vec![0; 10];
    same("bytes read", 10, file.read(&mut stream)? as u64)?;
    same("initial_bytes after reading 10", info.initial_bytes - 10, {
        file.precopy_info(None)?.initial_bytes
    })?;
    stream.resize(info.initial_bytes as usize, 0);
    file.read(&mut stream[10..])?;
    has_nothing_to_read(&file, "at the end of what is there in PRE_COPY")?;
    same("initial_bytes", 0, file.precopy_info(None)?.initial_bytes)?;
    let short = status(file.precopy_info(Some(23)))?;
    ensure!(short == Err(Errno::EINVAL), "argsz 23: {short:?}");
    fixture.wait_for_writes(10)?;
    set(&fixture, PreCopyP2p)?;
    has_nothing_to_read(&file, "in PRE_COPY_P2P")?;
    set(&fixture, PreCopy)?;
    fixture.wait_for_writes(10)?;

    set(&fixture, StopCopy)?;
    ensure!(file.is_readable()?, "there is the state to read, but poll says no");
    let info = status(file.precopy_info(None))?;
    ensure!(info == Err(Errno::EINVAL), "precopy_info in STOP_COPY: {info:?}");
    stream.extend(file.read_to_end(4096)?);
    same("bytes read at the end", 0, file.read(&mut [0; 10])? as u64)?;
    ensure!(file.is_readable()?, "at the end poll says no");
    let counter = fixture.device().generator()?.counter;
    fixture.has_generated(&config, counter)?;

    let other = Fixture::without_mapping(context, 1, PAGES)?;
    other.map(0..PAGES)?;
    load(&other, &stream)?;
    same("GEN_COUNTER", counter, other.device().generator()?.counter)?;
    same("PINS", 10, other.device().pins()?)?;

    // A migration that is given up: the device runs as if nothing had been.
    set(&fixture, Running)?;
    fixture.wait_for_writes(10)?;
    let file = begin(&fixture, PreCopy)?;
    set(&fixture, Running)?;
    fixture.wait_for_writes(10)?;
    let found = status(file.read(&mut [0; 10]))?;
    ensure!(found == Err(Errno::ENODEV), "read after PRE_COPY: {found:?}");
    Ok(())
}

fn chunks(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    for page in (0..PAGES).step_by(2) {
        fixture.pin(page..page + 1)?;
    }
    let stream = save(&fixture)?;
    let other = Fixture::without_mapping(context, 1, PAGES)?;
    other.map(0..PAGES)?;
    for at_once in [1, 7, 64, 4096] {
        set(&fixture, Stop)?;
        ensure!(begin(&fixture, StopCopy)?.read_to_end(at_once)? == stream, "{at_once} at once");
        let file = begin(&other, Resuming)?;
        for chunk in stream.chunks(at_once) {
            write(&file, chunk)?;
        }
        let empty: &[u8] = &[];
        write(&file, empty)?;
        set(&other, Stop)?;
        same("PINS", PAGES / 2, other.device().pins()?)?;
    }
    Ok(())
}

fn bad_buffer(context: &Context<'_>) -> Result<()> {
    let (fixture, expected) = interesting(context)?;
    let memory = Memory::new(expected.len().next_multiple_of(PAGE as usize))?;
    memory.set_access(0..memory.len(), Access::None)?;
    for state in [StopCopy, Resuming] {
        set(&fixture, Stop)?;
        let file = begin(&fixture, state)?;
        let transferred = status(file.transfer(&memory, expected.len()))?;
        ensure!(transferred == Err(Errno::EFAULT), "{state}: {transferred:?}");
        if state == StopCopy {
            let stream = file.read_to_end(1 << 16)?;
            ensure!(stream == expected, "the state is not what it is");
        } else {
            write(&file, &expected)?;
        }
    }
    set(&fixture, Stop)
}

/// A device with something in its state, stopped; and its stream.
fn interesting(context: &Context<'_>) -> Result<(Fixture, Vec<u8>)> {
    let fixture = Fixture::new(context, PAGES)?;
    fixture.pin(0..10)?;
    fixture.pin(5..6)?;
    succeeded("DMA_WRITE", fixture.device().dma_write(at(20, 0), PAGE, 4)?)?;
    set(&fixture, Stop)?;
    fixture.device().start_generator(&config(DMA_RW))?;
    fixture.device().run(Opcode::DmaWrite as u32, at(WINDOW, 0), PAGE, 5)?;
    let stream = save(&fixture)?;
    Ok((fixture, stream))
}

fn bad_stream(context: &Context<'_>) -> Result<()> {
    let (_fixture, stream) = interesting(context)?;
    let other = Fixture::without_mapping(context, 1, PAGES)?;
    other.map(0..PAGES)?;
    for len in (0..stream.len()).step_by(23).chain([stream.len() - 1]) {
        fails(&other, &format!("{len} bytes"), Errno::EINVAL, &stream[..len])?;
    }
    for at in (0..stream.len()).step_by(5) {
        let mut changed = stream.clone();
        changed[at] ^= 1 << (at % 8);
        fails(&other, &format!("byte {at} changed"), Errno::EINVAL, &changed)?;
    }
    let twice = [&stream[..], &stream[..]].concat();
    fails(&other, "twice", Errno::EINVAL, &twice)?;
    fails(&other, "one byte more", Errno::EINVAL, &[&stream[..], &[0]].concat())?;
    fails(&other, "zeroes", Errno::EINVAL, &[0; 1000])?;

    // More than any state has.
    let file = begin(&other, Resuming)?;
    let much = vec![0; 1 << 20];
    let mut written = 0;
    let error = loop {
        match status(file.write(&much))? {
            Ok(n) => written += n,
            Err(errno) => break errno,
        }
        ensure!(written < 1 << 30, "{written} bytes were taken");
    };
    ensure!(error == Errno::EFBIG, "writing on and on: {error}");
    other.device().device().reset()?;
    load(&other, &stream)
}

fn bad_state(context: &Context<'_>) -> Result<()> {
    let (_fixture, stream) = interesting(context)?;
    let other = Fixture::without_mapping(context, 1, PAGES)?;
    other.map(0..PAGES)?;
    let registers = 48 + 32 + 256;
    let runs = field(14);
    let einval = Errno::EINVAL;
    for (what, errno, at, bytes) in [
        ("another device", einval, 32, quad(0x1234)),
        ("another page size", einval, 40, quad(16384)),
        ("a later version of identity", einval, 8, long(2)),
        ("a later version of state", einval, 48 + 8, long(2)),
        ("no such section", einval, 48 + 12, long(3)),
        ("the same section twice", einval, 48 + 12, long(1)),
        ("a huge section", einval, 48 + 16, quad(u64::MAX)),
        ("in progress without a command", einval, field(0), quad(0)),
        ("neither yes nor no", einval, field(0), quad(2)),
        ("a command of no number", einval, field(1), quad(1 << 40)),
        (
            "a command that isn't in progress",
            einval,
            registers + uapi::RUST_MDEV_DMA_REG_STATUS as usize,
            long(0),
        ),
        ("a generator without window", einval, field(7), quad(0)),
        ("a generator without mode", einval, field(10) + 4, long(0)),
        ("a window that wraps", Errno::EOVERFLOW, field(6), quad(u64::MAX << 12)),
        ("a status of no number", einval, field(12), quad(1 << 40)),
        ("too many runs", einval, field(13), quad(1000)),
        ("runs that wrap", einval, field(13), quad(1 << 60)),
        ("too few runs", einval, field(13), quad(0)),
        ("a run at no page", einval, runs, quad(testbed::at(0, 8))),
        ("a run of no pages", einval, runs + 8, long(0)),
        ("a run without pins", einval, runs + 12, long(0)),
        ("a run of too many pins", einval, runs + 12, long(65536)),
        ("a run that wraps", einval, runs, quad(u64::MAX << 12)),
        ("more pins than there may be", Errno::ENOSPC, runs + 12, long(65535)),
        ("more pages than there may be", Errno::ENOSPC, runs + 8, long(1 << 31)),
    ] {
        fails(&other, what, errno, &changed(&stream, at, &bytes))?;
    }
    load(&other, &stream)
}

fn pins_not_mapped(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, PAGES)?;
    fixture.pin(0..PAGES)?;
    let stream = save(&fixture)?;
    let other = Fixture::without_mapping(context, 1, PAGES)?;
    other.map(0..PAGES - 1)?;
    not_yet(&other, "the last page isn't mapped", Errno::EINVAL, &stream)?;
    other.map(PAGES - 1..PAGES)?;
    set(&other, Stop)?;
    same("PINS", PAGES, other.device().pins()?)
}

fn ended_file(context: &Context<'_>) -> Result<()> {
    let mut fixture = Fixture::new(context, 1)?;
    let ended = |what: &str, file: &DataFile, errno| -> Result<()> {
        let (reads, _) = file.access()?;
        let found = match reads {
            true => status(file.read(&mut [0; 10]))?,
            false => status(file.write(&[0; 10]))?,
        };
        ensure!(found == Err(errno), "{what}: {found:?}, not {errno}");
        Ok(())
    };
    let file = begin(&fixture, StopCopy)?;
    set(&fixture, Stop)?;
    ended("STOP_COPY ended", &file, Errno::ENODEV)?;
    let file = begin(&fixture, Resuming)?;
    ensure!(!file.is_readable()?, "RESUMING: poll says that there is something to read");
    fixture.device().device().reset()?;
    ended("RESUMING was reset", &file, Errno::ENODEV)?;
    ensure!(!file.is_readable()?, "RESUMING was reset: poll says that there is something to read");
    let first = begin(&fixture, PreCopy)?;
    fixture.close();
    ended("the device was closed", &first, Errno::ENODEV)?;
    fixture.open()?;
    is_in(&fixture, Running)?;
    drop(fixture);
    ended("everything was closed", &first, Errno::ENODEV)
}
