{{/* The settings with what the chart decides, as YAML: the arguments of kvmesh.cluster.app:build. */}}
{{- define "kvmesh.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $engine := $config.engine | default dict -}}
{{- if not $engine.device -}}
{{- $engine = set (deepCopy $engine) "device" (ternary "cuda" "cpu" (not (empty (include "kvmesh.hasGpus" .)))) -}}
{{- end -}}
{{- $_ := set $config "engine" $engine -}}
{{- if include "kvmesh.needsKeys" . -}}
{{- $auth := $config.auth | default dict -}}
{{- $_ := set $config "auth" (set (deepCopy $auth) "key_directory" "/etc/kvmesh/keys") -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* serveConfigV2; `kvmesh config --serve` prints the same for the same settings. */}}
{{- define "kvmesh.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: {{ include "kvmesh.httpPort" . }}
grpc_options:
  port: {{ include "kvmesh.port" . }}
  grpc_servicer_functions:
    - {{ (include "kvmesh.generated" . | fromYaml).servicer }}
  enable_reflection: false
applications:
  - name: {{ (include "kvmesh.generated" . | fromYaml).application }}
    route_prefix: /
    import_path: {{ (include "kvmesh.generated" . | fromYaml).builder }}
    {{- if (.Values.config.autoscaling | default dict).min_groups }}
    external_scaler_enabled: true
    {{- end }}
    args:
      {{- include "kvmesh.config" . | nindent 6 }}
{{- end -}}

{{/* Groups of kvmesh with what each needs, as YAML: {groups: [{name, device, ranks, cpus}]}. */}}
{{- define "kvmesh.needs" -}}
{{- $config := include "kvmesh.config" . | fromYaml -}}
{{- $each := list -}}
{{- if kindIs "slice" $config.groups -}}
{{- $each = $config.groups -}}
{{- else -}}
{{- range until (int ($config.groups | default 1)) -}}{{- $each = append $each dict -}}{{- end -}}
{{- end -}}
{{- $found := list -}}
{{- range $index, $group := $each -}}
{{- $engine := merge (deepCopy ($group | default dict)) $config.engine -}}
{{- $ranks := mul ($engine.tp | default 1 | int) ($engine.kvp | default 1 | int) -}}
{{- $perRank := 1.0 -}}
{{- if hasKey $engine "cpus_per_rank" -}}{{- $perRank = $engine.cpus_per_rank | float64 -}}{{- end -}}
{{- $cpus := addf 0.1 (mulf $ranks $perRank) -}}
{{- $found = append $found (dict "name" (printf "engine-%d" $index) "device" $engine.device "ranks" $ranks "cpus" $cpus) -}}
{{- end -}}
{{- dict "groups" $found | toYaml -}}
{{- end -}}

{{/* Fails where Ray would wait forever: a group is on one worker, and has to fit on one. */}}
{{- define "kvmesh.check" -}}
{{- if regexMatch "^[^a-z]|[.]" (include "kvmesh.fullname" .) -}}
{{- fail (printf "fullnameOverride: a RayService's name begins with a letter and has no dot, unlike %s; choose another" (include "kvmesh.fullname" .)) -}}
{{- end -}}
{{- $workers := include "kvmesh.workerGroups" . | fromYaml -}}
{{- if not $workers -}}{{- fail "workerGroups: there must be one" -}}{{- end -}}
{{- $gpus := 0 -}}
{{- $cpus := 0.0 -}}
{{- range $workers -}}
{{- $most := .replicas | int -}}
{{- if and $.Values.autoscaling.enabled (not (kindIs "invalid" .maxReplicas)) -}}{{- $most = .maxReplicas | int -}}{{- end -}}
{{- $gpus = add $gpus (mul $most (int .gpu.count)) -}}
{{- $cpus = addf $cpus (mulf $most .cpus) -}}
{{- end -}}
{{- $ingress := .Values.config.ingress | default dict -}}
{{- $neededCpus := addf 0.1 (mulf 0.1 ($ingress.replicas | default 1)) -}}
{{- $neededGpus := 0 -}}
{{- range (include "kvmesh.needs" . | fromYaml).groups -}}
{{- $need := . -}}
{{- $fits := false -}}
{{- range $workers -}}
{{- $enough := ge (.cpus | float64) ($need.cpus | float64) -}}
{{- if eq $need.device "cuda" -}}{{- $enough = and $enough (ge (int .gpu.count) (int $need.ranks)) -}}{{- end -}}
{{- if $enough -}}{{- $fits = true -}}{{- end -}}
{{- end -}}
{{- if not $fits -}}
{{- fail (printf "workerGroups: %s is on one worker and needs %v CPUs%s, but no worker has that; give a worker more cpus or gpu.count, or use a smaller tp or kvp" $need.name $need.cpus (ternary (printf " and %d GPUs" (int $need.ranks)) "" (eq $need.device "cuda"))) -}}
{{- end -}}
{{- $neededCpus = addf $neededCpus $need.cpus -}}
{{- if eq $need.device "cuda" -}}{{- $neededGpus = add $neededGpus $need.ranks -}}{{- end -}}
{{- end -}}
{{- if or (gt (int $neededGpus) (int $gpus)) (gt (float64 $neededCpus) (float64 $cpus)) -}}
{{- fail (printf "workerGroups: all groups and the ingresses need %v CPUs and %d GPUs, but the workers have %v and %d; add replicas, cpus or gpu.count" $neededCpus (int $neededGpus) $cpus (int $gpus)) -}}
{{- end -}}
{{- end -}}
