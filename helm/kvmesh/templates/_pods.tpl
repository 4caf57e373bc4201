{{/* Variables of every pod: Serve reads them on every node before it starts. */}}
{{- define "kvmesh.env" -}}
{{- $generated := include "kvmesh.generated" . | fromYaml -}}
{{- range $name, $value := $generated.variables }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- range $generated.sizeVariables }}
- name: {{ . }}
  value: {{ include "kvmesh.messageBytes" $ | quote }}
{{- end }}
- name: {{ $generated.drainVariable }}
  value: {{ add (include "kvmesh.drainSeconds" . | int64) (int64 $generated.nodeDrainMarginSeconds) | quote }}
- name: HOME
  value: /tmp
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
{{- with .Values.ray.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Variables of workers alone: those with a Secret of the chart among them. */}}
{{- define "kvmesh.workerEnv" -}}
{{- $volume := .Values.model.volume -}}
- name: NUMBA_CACHE_DIR
  value: /tmp/numba
- name: XDG_CACHE_HOME
  value: {{ ternary (printf "%s/cache" $volume.mountPath) "/tmp/cache" (and $volume.enabled (not $volume.readOnly)) }}
{{- if $volume.enabled }}
- name: HF_HOME
  value: {{ $volume.mountPath }}/hub
{{- end }}
{{- include "kvmesh.hubEnv" (dict "root" . "head" false) }}
{{- end -}}

{{/* Variables of all that ask the hub: workers fetch the model there, and Serve builds the
application on the head, which pins the model's commit. Takes {root, head}. The head starts
without the Secret, too: see its volumes. */}}
{{- define "kvmesh.hubEnv" -}}
{{- if .root.Values.model.hub.offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- $hub := .root.Values.model.hub -}}
{{- $head := .head -}}
{{- with include "kvmesh.hubSecret" .root }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ ternary $hub.existingSecretKey "token" (not (empty $hub.existingSecret)) }}
      {{- if $head }}
      optional: true
      {{- end }}
{{- end }}
{{- end -}}

{{- define "kvmesh.ports" -}}
- name: serve
  containerPort: {{ include "kvmesh.httpPort" . }}
- name: serve-grpc
  containerPort: {{ include "kvmesh.port" . }}
- name: metrics
  containerPort: 8080
{{- end -}}

{{- define "kvmesh.container" -}}
image: {{ include "kvmesh.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
{{- end -}}

{{/* Scheduling and the like; takes {root, pod}, where pod is `head` or a worker group. */}}
{{- define "kvmesh.podSpec" -}}
{{- with .root.Values.podSecurityContext }}
securityContext:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .root.Values.autoscaling.enabled }}
restartPolicy: Never
{{- end }}
{{- $pod := .pod -}}
{{- range $key := list "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "priorityClassName" "runtimeClassName" }}
{{- with get $pod $key }}
{{ dict $key . | toYaml }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Files that a container may write: the root file system is read-only. */}}
{{- define "kvmesh.scratch" -}}
- name: tmp
  emptyDir: {}
{{- end -}}
