# SPDX-License-Identifier: GPL-2.0
#
# The one place to start everything from; what happens is in tools/vm.

# Every recipe dies with make, whatever ended it.
vm := @setpriv --pdeathsig KILL -- tools/vm

export ARGS ACCEL BASE CLOCK TIMEOUT CACHE KDIR KERNEL MIRROR PATCHES DRIVER_PATCHES QEMU TREE CONFIG DRIVER DRIVER_WHY REPLAY RUSTC BINDGEN BOOTS RUNS SECONDS_OF_RACE MUTANTS_N SEED OPERATORS ENGINES JOBS CRATES

.DEFAULT_GOAL := help
.PHONY: help run killers debug pins pins-fuzz fail-nth fuzz race abuse scope migrate migrate-guest libvirt control mutants mutants-model coverage \
	bench test test-all module tool install-kselftest shell boot-soak clean clean-cache

# What is built for one kernel says nothing of another.
ifneq ($(and $(KDIR),$(filter-out help module install-kselftest clean clean-cache,$(MAKECMDGOALS))),)
$(error KDIR= is for make module and make install-kselftest only, for all else give the source, TREE=, see Documentation/tree.rst, or leave both out)
endif

help:
	@echo 'Dirty pages of a mediated device, checked on a stock kernel in a VM.'
	@echo
	@echo '  make run          build all, boot the VM, run the scenarios'
	@echo '  make killers      show the defects after which a kernel has to be booted again'
	@echo '  make pins         pins as real drivers make them, in a VM of their own'
	@echo '  make fail-nth     what fails when the kernel runs out of memory, one allocation at a time'
	@echo '  make fuzz         random sequences for a minute'
	@echo '  make abuse        what no client should do, to see that it harms nobody'
	@echo '  make pins-fuzz    the same with such pins'
	@echo '  make race         several threads and devices at the same time, for ten minutes'
	@echo '  make scope        everything that decides what is dirty, in a small universe'
	@echo '  make migrate      migrate machines of QEMU and of a minimal VMM, compare their memory'
	@echo '  make migrate-guest  the same with a guest, which checks its memory by itself'
	@echo '  make libvirt      what libvirt makes of a domain with the device'
	@echo '  make control      see that all these find what a broken type1 loses, or a broken driver does'
	@echo '  make mutants      how many mutants of type1 all these find'
	@echo '  make mutants-model  how many mutants of the model its unit tests find'
	@echo '  make coverage     which lines of type1 and of the drivers all these run'
	@echo '  make bench        how fast driver and type1 are, beside a driver in C'
	@echo '  make debug        all of it on a kernel with KASAN, lockdep, kmemleak and more'
	@echo '  make test         formatting, lints and unit tests, then make run'
	@echo '  make test-all     and with other people'\''s CI, make debug and coverage'
	@echo '  make shell        the VM with the device loaded, and a prompt'
	@echo '  make module       build both drivers for the VM, or for KDIR'
	@echo '  make tool         build dirtyscope'
	@echo '  make install-kselftest DIR=...  drivers and tool as a target of kselftest'
	@echo '  make boot-soak    boot N times and count'
	@echo '  make clean        remove build/'
	@echo '  make clean-cache  remove the build room and the kernel; the next run'
	@echo '                    takes the newest trixie-backports has'
	@echo
	@echo 'build/ has what came out of the last run; several may go on at a time.'
	@echo
	@echo 'Variables:'
	@echo '  ARGS=...     more arguments for dirtyscope, e.g. ARGS="--filter unmap"'
	@echo '  PATCHES=...  patches for drivers/vfio/*.c, type1 and vfio.ko are then rebuilt, e.g.'
	@echo '               PATCHES="Documentation/findings/*.patch"'
	@echo '  DRIVER_PATCHES=...  the same for the drivers, of which a copy is built, e.g.'
	@echo '               DRIVER_PATCHES="tools/mutants/driver/NAME.patch"'
	@echo '  REPLAY=...   files that make fuzz, race or abuse saved, to be replayed, and nothing else'
	@echo '  MUTANTS=...  those of make control, e.g. "history/*", which the default leaves out'
	@echo '  JOBS=...     how many of these are tried at a time, default: as many as there are CPUs;'
	@echo '               of the runs of make debug as well; for make fuzz and pins-fuzz'
	@echo '               how many VMs share the seeds, default: 1; for make mutants 2'
	@echo '  MUTANTS_N=...  mutants of make mutants that have no result yet, default: 300;'
	@echo '               SEED=... the sample, default: 1; IDS=... these in place of it;'
	@echo '               OPERATORS=... those that these operators make, default: all;'
	@echo '               ENGINES=... by what they are tried, of scenarios, pins, fuzz, race,'
	@echo '               abuse and scope, default: the first three'
	@echo '  CRATES=...   of make mutants-model, default: dirty-model'
	@echo '  TREE=...     a kernel tree of yours, which is built as it is, with the drivers'
	@echo '               laid over, and tested in place of the stock kernel'
	@echo '  CONFIG=...   how TREE is configured: lean (the default), debug, coverage, or a'
	@echo '               file'
	@echo '  DRIVER=c     the driver in C in place of those in Rust, for what needs commands'
	@echo '               only; for a TREE that Rust drivers cannot be built for, by itself'
	@echo '  KDIR=...     a kernel build tree with CONFIG_RUST=y, for make module only;'
	@echo '               builds with the tools on PATH (RUSTC=, BINDGEN= override)'
	@echo '  CACHE=...    where prepared things are kept (about 4 GB), default'
	@echo '               $${XDG_CACHE_HOME:-~/.cache}/rust-mdev-dma'
	@echo '  KERNEL=...   a release that is in the cache, default: the one fetched last'
	@echo '  MIRROR=...   Debian mirror, default: the one this host uses'
	@echo '  ACCEL=kvm    run the VM on KVM; default: tcg, and for a TREE what works'
	@echo '  CLOCK=wall   make bench measures time; default: it counts instructions,'
	@echo '               but for ACCEL=kvm'
	@echo '  BASE=...     the commit whose driver make test compares with; default: HEAD'
	@echo '               if the driver has changed since, else its parent'
	@echo '  TIMEOUT=...  seconds after which a VM is stopped, default: 300'
	@echo '  RUNS=...     some of the runs of make debug or coverage, e.g. RUNS="verify scope"'
	@echo '  QEMU=...     for make migrate, a directory below which another QEMU was installed,'
	@echo '               see Documentation/migrate.rst; default: that of the build room'
	@echo '  ROUNDS=...   migrations in a row, after one of each kind, default: 50'
	@echo '  SECONDS_OF_RACE=...  for make race, in as many boots as that takes, default: 600'
	@echo '  N=...        boots of make boot-soak, default: 100'

run:
	$(vm)/run verify

killers:
	$(vm)/run killers

pins:
	$(vm)/run pins

fail-nth:
	$(vm)/run fail-nth

fuzz:
	$(vm)/fuzz fuzz

abuse:
	$(vm)/run abuse

scope:
	$(vm)/run scope

race:
	$(vm)/race

pins-fuzz:
	$(vm)/fuzz pins-fuzz

ROUNDS ?= 50
migrate:
	$(vm)/migrate '$(ROUNDS)'

migrate-guest:
	$(vm)/migrate-guest

libvirt:
	$(vm)/libvirt

control:
	$(vm)/control $(patsubst %,'%',$(MUTANTS))

mutants:
	$(vm)/mutants $(IDS)

mutants-model:
	$(vm)/mutants-model

coverage:
	$(vm)/coverage

bench:
	$(vm)/bench

debug:
	$(vm)/debug

test:
	$(vm)/check

test-all:
	$(vm)/check-all

module:
	$(vm)/$(if $(KDIR),module-kdir '$(KDIR)',module)

tool:
	$(vm)/tool

install-kselftest:
	$(vm)/install-kselftest '$(DIR)'

shell:
	$(vm)/shell

N ?= 100
boot-soak:
	$(vm)/soak '$(N)'

clean:
	$(vm)/clean

clean-cache:
	$(vm)/clean-cache
